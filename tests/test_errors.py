"""What every front end asks of an error: whose fault it is, and one line."""

import pytest

from fly_trt import errors
from fly_trt.errors import Fault, FlyError, one_line

FAULTS = {
    "FlyError": Fault.ENGINE,
    "ConfigError": Fault.CALLER,
    "CheckpointError": Fault.ENGINE,
    "EngineError": Fault.ENGINE,
    "EngineDeadError": Fault.ENGINE,
    "RequestError": Fault.CALLER,
    "QueueFullError": Fault.LOAD,
    "QueueTimeoutError": Fault.LOAD,
}


def test_every_error_says_whose_fault_it_is() -> None:
    found = {
        name: value.fault
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, FlyError)
    }
    assert found == FAULTS


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("out of\n  memory"), "out of memory"),
        (ValueError(), "ValueError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (ValueError("half \ud800"), "half \\ud800"),
    ],
)
def test_any_error_is_one_line_that_can_be_sent(error: BaseException, line: str) -> None:
    assert one_line(error) == line
    one_line(error).encode()
