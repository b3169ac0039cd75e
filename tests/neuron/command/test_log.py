from cortex.neuron.command.log import EngineLog


def test_the_tail_is_the_last_twenty_lines_and_what_has_no_end_yet(tmp_path):
    log = EngineLog(tmp_path, "m", max_bytes=1000)
    log.note(b"".join(b"line %d\n" % index for index in range(30)) + b"Traceback")
    assert log.tail[0] == "line 10"
    assert log.tail[-2:] == ["line 29", "Traceback"]


def test_a_line_that_comes_in_pieces_is_one_line(tmp_path):
    log = EngineLog(tmp_path, "m", max_bytes=1000)
    for piece in (b"one ", b"two\nthr", b"ee\n"):
        log.note(piece)
    assert log.tail == ["one two", "three"]


def test_a_progress_bar_shows_where_it_stands_and_does_not_grow(tmp_path):
    log = EngineLog(tmp_path, "m", max_bytes=1000)
    for percent in range(100):
        log.note(b"\rloading %d%%" % percent)
    assert log.tail == ["loading 99%"]


def test_the_files_hold_what_came_last_and_never_more_than_their_bound(tmp_path):
    log = EngineLog(tmp_path / "engines", "org/m", max_bytes=2000)
    for index in range(300):
        log.write(b"%07d\n" % index)
    path = tmp_path / "engines" / "org%2Fm.log"
    old = tmp_path / "engines" / "org%2Fm.log.1"
    assert path.stat().st_size + old.stat().st_size <= 2000
    assert (old.read_bytes() + path.read_bytes()).endswith(b"0000298\n0000299\n")
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_name_cannot_leave_the_folder(tmp_path):
    for name in ("../../etc/passwd", "..", "/etc/passwd", "a" * 5000):
        assert EngineLog(tmp_path, name, max_bytes=1000).path.parent == tmp_path
        EngineLog(tmp_path, name, max_bytes=1000).write(b"x")
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_that_cannot_be_written_costs_its_lines_and_says_so_once(tmp_path, caplog):
    (tmp_path / "engines").write_text("in the way")
    log = EngineLog(tmp_path / "engines", "m", max_bytes=1000)
    log.write(b"x\n")
    log.write(b"y\n")
    assert [each.message for each in caplog.records] == ["the output of an engine cannot be kept"]
