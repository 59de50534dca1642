"""The audit log: whole lines, files of bounded size, and a disk that harms nobody."""

import errno
import json
import logging
import os
import threading

import pytest

from fly_trt.errors import ConfigError
from fly_trt.runtime.audit_log import AuditLog, AuditLogConfig


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_numbers(path, numbers, **config):
    log = AuditLog(AuditLogConfig(path=str(path), **config))
    for number in numbers:
        log.write(lambda number=number: {"number": number})
    log.close()
    return log


def test_each_audit_is_a_line_of_json_behind_those_of_earlier_runs(tmp_path):
    path = tmp_path / "audit.jsonl"
    assert log_numbers(path, range(3)).num_written == 3
    log_numbers(path, [3])
    assert [line["number"] for line in written(path)] == [0, 1, 2, 3]
    assert path.stat().st_mode & 0o077 == 0  # it may have texts


def test_a_log_that_nothing_is_written_to_makes_no_file_and_no_thread(tmp_path):
    before = threading.active_count()
    log = AuditLog(AuditLogConfig(path=str(tmp_path / "audit.jsonl")))
    assert threading.active_count() == before
    log.close()
    assert not list(tmp_path.iterdir())


def test_files_are_rotated_before_they_are_too_long_and_the_oldest_goes(tmp_path):
    path = tmp_path / "audit.jsonl"
    line = len(b'{"number":10}\n')
    log_numbers(path, range(10, 60), max_bytes=5 * line, backups=2)
    names = ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert sorted(os.listdir(tmp_path)) == names
    assert [[each["number"] for each in written(tmp_path / name)] for name in names] == [
        list(range(55, 60)),
        list(range(50, 55)),
        list(range(45, 50)),
    ]


def test_without_backups_a_full_file_begins_anew(tmp_path):
    path = tmp_path / "audit.jsonl"
    log_numbers(path, range(10, 20), max_bytes=40, backups=0)
    assert os.listdir(tmp_path) == ["audit.jsonl"]
    assert written(path)[-1] == {"number": 19}


def test_a_line_that_is_longer_than_a_file_may_be_has_a_file_of_its_own(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(AuditLogConfig(path=str(path), max_bytes=50))
    for text in ("a", "b" * 200, "c"):
        log.write(lambda text=text: {"text": text})
    log.close()
    assert written(path) == [{"text": "c"}]
    assert written(tmp_path / "audit.jsonl.1") == [{"text": "b" * 200}]


def test_several_writers_of_one_file_lose_no_line_when_they_rotate_it(tmp_path):
    path = tmp_path / "audit.jsonl"
    logs = [AuditLog(AuditLogConfig(path=str(path), max_bytes=400, backups=50)) for _ in range(4)]
    for number in range(100):
        for writer, log in enumerate(logs):
            log.write(lambda number=number, writer=writer: {"number": number, "writer": writer})
    for log in logs:
        log.close()
    lines = [line for file in tmp_path.iterdir() for line in written(file)]
    assert sorted((line["writer"], line["number"]) for line in lines) == [(w, n) for w in range(4) for n in range(100)]


def test_a_missing_folder_costs_lines_and_one_warning_until_it_is_there(tmp_path, caplog):
    path = tmp_path / "gone" / "audit.jsonl"
    log = AuditLog(AuditLogConfig(path=str(path)))
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            log.write(lambda number=number: {"number": number})
        log.close()
        assert (log.num_written, log.num_lost) == (0, 5)
        assert len(caplog.records) == 1
        assert "gone/audit.jsonl: not written" in caplog.text
        path.parent.mkdir()
        log.write(lambda: {"number": 5})
        log.close()
    assert written(path) == [{"number": 5}]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("fits", [0, 4])
def test_a_full_disk_leaves_no_part_of_a_line(tmp_path, monkeypatch, fits):
    path, real_write = tmp_path / "audit.jsonl", os.write
    log_numbers(path, [1])

    def write(descriptor, data):
        if b"number" not in data:  # somebody else's
            return real_write(descriptor, data)
        if not fits:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(descriptor, data[:fits])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        assert log_numbers(path, [2, 3]).num_lost == 2
    log_numbers(path, [4])
    assert [line["number"] for line in written(path)] == [1, 4]


def test_a_record_that_cannot_be_made_is_one_line_less(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(AuditLogConfig(path=str(path)))
    for record in ({"number": float("nan")}, {"number": object()}, {"number": 3}):
        log.write(lambda record=record: record)
    log.close()
    assert written(path) == [{"number": 3}]
    assert log.num_lost == 2


def test_a_disk_that_stands_still_holds_nobody_up(tmp_path, monkeypatch):
    monkeypatch.setattr("fly_trt.runtime.audit_log.MAX_WAITING", 3)
    log = AuditLog(AuditLogConfig(path=str(tmp_path / "audit.jsonl")))
    stands, goes_on = threading.Event(), threading.Event()

    def slow():
        stands.set()
        goes_on.wait()
        return {"number": 0}

    log.write(slow)
    stands.wait()
    for number in range(1, 6):
        log.write(lambda number=number: {"number": number})
    assert log.num_lost == 2
    goes_on.set()
    log.close()
    assert log.num_written == 4


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"path": ""}, "audit_log ''"),
        ({"path": "/"}, "audit_log '/': expected the path of a file"),
        ({"path": "a", "max_bytes": 0}, "audit_log_max_bytes"),
        ({"path": "a", "backups": -1}, "audit_log_backups"),
    ],
)
def test_a_log_that_cannot_be_is_refused_by_the_settings_name(config, said):
    with pytest.raises(ConfigError, match=said):
        AuditLogConfig(**config)
