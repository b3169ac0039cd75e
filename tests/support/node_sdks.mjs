// The official npm SDKs against a gateway: `node node_sdks.mjs answers|error URL`.
// Prints one JSON object of what came back; tests/flows/test_node_sdks.py says what ought to.
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const [what, url] = process.argv.slice(2);
const model = process.argv[4] ?? "cortex-tiny";
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "k", maxRetries: 0 });
const anthropic = new Anthropic({ baseURL: url, apiKey: "k", maxRetries: 0 });

const user = (content) => [{ role: "user", content }];
const schema = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
};
const chatTool = { type: "function", function: { name: "get_weather", parameters: schema } };
const messageTool = { name: "get_weather", input_schema: schema };
const asked = { model, temperature: 0, max_tokens: 200 };

async function chat(fields) {
  const whole = await openai.chat.completions.create({ ...asked, ...fields });
  const stream = openai.chat.completions.stream({
    ...asked, ...fields, stream_options: { include_usage: true },
  });
  const streamed = await stream.finalChatCompletion();
  return [whole, streamed].map((each) => ({
    content: each.choices[0].message.content,
    calls: (each.choices[0].message.tool_calls ?? []).map((call) => [
      call.function.name, JSON.parse(call.function.arguments),
    ]),
    finish: each.choices[0].finish_reason,
    tokens: [each.usage.prompt_tokens, each.usage.completion_tokens],
  }));
}

async function message(fields) {
  const whole = await anthropic.messages.create({ ...asked, ...fields });
  const streamed = await anthropic.messages.stream({ ...asked, ...fields }).finalMessage();
  return [whole, streamed].map((each) => ({
    kinds: each.content.map((block) => block.type),
    text: each.content.filter((block) => block.type === "text").map((block) => block.text).join(""),
    uses: each.content.filter((block) => block.type === "tool_use").map((use) => [use.name, use.input]),
    reason: each.stop_reason,
    sequence: each.stop_sequence,
    tokens: [each.usage.input_tokens + each.usage.cache_read_input_tokens, each.usage.output_tokens],
  }));
}

async function answers() {
  const weather = user("What is the weather in Paris?");
  const count = user("Count from 1 to 9.");
  const ids = [];
  for await (const each of openai.models.list()) ids.push(each.id);
  const pages = [];
  for await (const each of anthropic.models.list({ limit: 1 })) pages.push(each.id);
  const body = { model, messages: weather, tools: [messageTool] };
  return {
    chat: await chat({ messages: user("Who are you?") }),
    chat_tool: await chat({ messages: weather, tools: [chatTool] }),
    chat_stop: await chat({ messages: count, stop: ["5"] }),
    message: await message({ messages: user("Who are you?") }),
    message_tool: await message({ messages: weather, tools: [messageTool] }),
    message_stop: await message({ messages: count, stop_sequences: ["5"] }),
    message_thinking: await message({
      messages: user("What is the capital of Italy?"),
      thinking: { type: "enabled", budget_tokens: 1024 },
      max_tokens: 2000,
    }),
    counted: (await anthropic.messages.countTokens(body)).input_tokens,
    models: [ids.includes(model), pages.includes(model)],
  };
}

function told(error) {
  return { kind: error.constructor.name, status: error.status ?? null, message: error.message };
}

async function caught(call) {
  try {
    await call();
    return null;
  } catch (error) {
    return told(error);
  }
}

async function error() {
  const messages = user("Hi");
  const consume = async (stream) => {
    for await (const _ of stream);
  };
  return {
    chat: await caught(() => openai.chat.completions.create({ model, messages })),
    chat_stream: await caught(async () =>
      consume(await openai.chat.completions.create({ model, messages, stream: true }))),
    message: await caught(() => anthropic.messages.create({ model, messages, max_tokens: 9 })),
    message_stream: await caught(async () =>
      consume(await anthropic.messages.create({ model, messages, max_tokens: 9, stream: true }))),
  };
}

console.log(JSON.stringify(await { answers, error }[what]()));
