"""Somebody else's server without a model: answers in OpenAI's API and does what a script tells it.

    python -m tests.support.fake_server DIRECTORY --port PORT [ARGUMENT ...]

The script is `script.json` in the directory (see `Script`), read anew for each request; each
start adds a line with its process id to `starts` there, and each request its body to
`requests`. The answer is the words of the last message or of the prompt, one token each.
"""

import argparse
import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import msgspec

COMMAND = [sys.executable, "-m", "tests.support.fake_server"]


class Script(msgspec.Struct, kw_only=True):
    """What the fake does.

    Attributes:
        start_s: how long /health answers 503 after the start.
        health: status of /health after that; 0 never answers, so that it hangs.
        die_starts: how many starts end with code 3 and some words.
        name: the only model name it accepts; None accepts any.
        gap_s: pause between two tokens.
        mute_s: silence before the first token.
        die_on: a word at which it kills itself.
        hang_on: a word at which it freezes as a whole.
        status: status of chats that are refused with `error`.
        usage_in: where a stream tells usage: a chunk of its own, the last chunk, or nowhere.
        done: whether a stream ends with `[DONE]`.
        break_off: whether a stream ends after the first token, without a word.
        stubborn: ignores SIGTERM.
        child: starts a process of its own, in a session of its own.
        tokenize: whether it has /tokenize, in vLLM's form.
        room: tokens that prompt and answer may have together; a chat that may need more is refused.
    """

    start_s: float = 0.0
    health: int = 200
    die_starts: int = 0
    name: str | None = None
    gap_s: float = 0.0
    mute_s: float = 0.0
    die_on: str | None = None
    hang_on: str | None = None
    status: int = 200
    error: Any = None
    usage_in: str = "own"
    done: bool = True
    break_off: bool = False
    stubborn: bool = False
    child: bool = False
    tokenize: bool = False
    room: int | None = None


def write_script(directory: Path, **values: object) -> None:
    """Put a script into a server's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    script = Script(**values)  # type: ignore[arg-type]
    (directory / "script.json").write_bytes(msgspec.json.encode(script))


def starts(directory: Path) -> list[int]:
    """Return the process ids of all starts."""
    path = directory / "starts"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def requests(directory: Path) -> list[Any]:
    """Return the bodies of all chats, each with some of its headers under `headers`."""
    path = directory / "requests"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def child_pid(directory: Path) -> int:
    """Return the process id of the child it has started."""
    return int((directory / "child").read_text())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    directory: Path
    begun_s: float

    @property
    def script(self) -> Script:
        path = self.directory / "script.json"
        return msgspec.json.decode(path.read_bytes(), type=Script) if path.exists() else Script()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        say(f"{self.command} {self.path}")

    def do_GET(self) -> None:
        script = self.script
        if self.path == "/health":
            if script.health == 0:
                time.sleep(3600)
            ready = time.monotonic() - self.begun_s >= script.start_s
            self.answer(script.health if ready else 503, {"status": "ok" if ready else "loading"})
        elif self.path == "/v1/models":
            card = {"id": script.name or "fake", "object": "model", "max_model_len": 4096}
            self.answer(200, {"object": "list", "data": [card]})
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        script = self.script
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize" and script.tokenize:
            tokens = list(range(len(words_of(body))))
            self.answer(200, {"count": len(tokens), "max_model_len": 4096, "tokens": tokens})
            return
        if self.path not in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
            self.answer(404, {"detail": "Not Found"})
            return
        with (self.directory / "requests").open("a") as file:
            told = {name: self.headers[name] for name in ("x-request-id",) if name in self.headers}
            file.write(json.dumps({**body, "headers": told}) + "\n")
        if script.name is not None and body["model"] != script.name:
            self.answer(404, {"error": {"message": f"no model {body['model']}", "code": 404}})
        elif script.status != 200:
            self.answer(script.status, script.error)
        elif self.path == "/v1/embeddings":
            self.embed(script, body)
        elif script.room is not None and len(words_of(body)) + bound_of(body) > script.room:
            said = f"max_tokens is too large: the maximum context length is {script.room} tokens"
            self.answer(400, {"error": {"message": said, "code": 400}})
        elif body.get("stream"):
            self.stream(script, body)
        else:
            self.whole(script, body)

    def whole(self, script: Script, body: Any) -> None:
        words = words_of(body)
        for word in words:
            self.act(script, word)
        text = " ".join(words)
        said = (
            {"message": {"role": "assistant", "content": text}} if is_chat(body) else {"text": text}
        )
        choice = {"index": 0, **said, "finish_reason": "stop", "own_field": [1, 2]}
        answer = {**self.head(body), "choices": [choice], "usage": usage(words)}
        self.answer(200, answer)

    def embed(self, script: Script, body: Any) -> None:
        time.sleep(script.mute_s)
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        data = [
            {"object": "embedding", "index": at, "embedding": [float(len(text)), 0.25]}
            for at, text in enumerate(texts)
        ]
        counts = {"prompt_tokens": 5, "total_tokens": 5}
        self.answer(200, {"object": "list", "data": data, "model": body["model"], "usage": counts})

    def stream(self, script: Script, body: Any) -> None:
        words = words_of(body)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self.wfile.write(b": hello\n\n")
            if is_chat(body):
                self.chunk(body, {"role": "assistant", "content": ""})
            time.sleep(script.mute_s)
            for word in words:
                self.act(script, word)
                options = body.get("stream_options") or {}
                running = {"usage": usage(words[:1])} if "continuous_usage_stats" in options else {}
                self.chunk(body, {"content": word + " "}, **running)
                if script.break_off:
                    return
            last = {"usage": usage(words)} if script.usage_in == "last" else {}
            self.chunk(body, {}, finish_reason="stop", **last)
            if script.usage_in == "own":
                self.event({**self.head(body, ".chunk"), "choices": [], "usage": usage(words)})
            if script.done:
                self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            (self.directory / "left").write_text("")

    def act(self, script: Script, word: str) -> None:
        time.sleep(script.gap_s)
        if word == script.die_on:
            say(f"cannot bear {word}")
            os.kill(os.getpid(), signal.SIGKILL)
        if word == script.hang_on:
            os.kill(os.getpid(), signal.SIGSTOP)
        if word in (script.die_on, script.hang_on):
            # A signal may come a moment after it was sent.
            time.sleep(3600)

    def chunk(self, body: Any, delta: Any, finish_reason: Any = None, **extra: Any) -> None:
        said = {"delta": delta} if is_chat(body) else {"text": delta.get("content", "")}
        choice = {"index": 0, **said, "finish_reason": finish_reason}
        self.event({**self.head(body, ".chunk"), "choices": [choice], "usage": None, **extra})

    def event(self, data: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

    def head(self, body: Any, suffix: str = "") -> Any:
        kind = f"chat.completion{suffix}" if is_chat(body) else "text_completion"
        return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": body["model"]}

    def answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def is_chat(body: Any) -> bool:
    return "messages" in body


def bound_of(body: Any) -> int:
    """Return how long an answer may be; without a bound it takes what room there is."""
    bound: int = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    return bound


def words_of(body: Any) -> list[str]:
    text: str = body["messages"][-1]["content"] if is_chat(body) else body["prompt"]
    return text.split()


def usage(words: list[str]) -> Any:
    return {
        "prompt_tokens": 7,
        "completion_tokens": len(words),
        "total_tokens": 7 + len(words),
        "prompt_tokens_details": {"cached_tokens": 3},
    }


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64


def main() -> None:
    """Serve until something ends it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, required=True)
    options, _ = parser.parse_known_args()
    directory: Path = options.directory
    with (directory / "starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    (directory / "environment").write_text(json.dumps(dict(os.environ)))
    (directory / "arguments").write_text(json.dumps(sys.argv[1:]))
    _Handler.directory = directory
    _Handler.begun_s = time.monotonic()
    script = _Handler.script.fget(_Handler)  # type: ignore[attr-defined]
    say(f"fake server on {options.port}")
    if len(starts(directory)) <= script.die_starts:
        say("out of luck: no such weights")
        sys.exit(3)
    if script.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if script.child:
        child = subprocess.Popen([sys.executable, "-c", SLEEPER], start_new_session=True)
        (directory / "child").write_text(str(child.pid))
    with _Server(("127.0.0.1", options.port), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        signal.pause()


SLEEPER = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"


if __name__ == "__main__":
    main()
