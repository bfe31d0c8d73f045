from recllm import progress
from recllm.progress import clock


def test_days_are_hours_too():
    assert clock(59.9) == "00:00:59"
    assert clock(3600 + 61) == "01:01:01"
    assert clock(26 * 3600) == "26:00:00"
    assert clock(250 * 3600) == "250:00:00"


def test_a_log_file_gets_a_line_with_the_time_left(monkeypatch, capfd):
    """1 of 93,601 in a second: 93,600 s, which are 26 hours, are left."""
    seconds = iter([0.0, 1.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(progress, "EVERY", 1.0)
    with progress.progress("reading", 93_601) as advance:
        advance(1)
    assert "reading 1/93,601, 1.0/s, 26:00:00 left" in capfd.readouterr().err
