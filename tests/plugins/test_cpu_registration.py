"""How the library of plugins/cpu registers its operators, seen from an ONNX Runtime that does as it is told: a table of
functions, as the C interface has it."""

import ctypes
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NUM_OPERATORS = 6
NUM_ENTRIES = 275
CREATE_STATUS, CREATE_DOMAIN, ADD_OPERATOR, ADD_DOMAIN, RELEASE_DOMAIN = 0, 26, 27, 28, 101
DOMAIN = 0x1000  # the first one's address


class Runtime:
    """Versions up to `version`. Notes what is called, and fails at the `failing`th operator that is added."""

    def __init__(self, library: Path, version: int = 28, failing: int = 0) -> None:
        self.calls: list[str] = []
        self.said: list[str] = []
        self.failing, self._num_added = failing, 0
        pointer, functions = ctypes.c_void_p, {}
        functions[CREATE_STATUS] = self._function(self._create_status, pointer, ctypes.c_int, ctypes.c_char_p)
        functions[CREATE_DOMAIN] = self._function(
            self._create_domain, pointer, ctypes.c_char_p, ctypes.POINTER(pointer)
        )
        functions[ADD_OPERATOR] = self._function(self._add_operator, pointer, pointer, pointer)
        functions[ADD_DOMAIN] = self._function(self._add_domain, pointer, pointer, pointer)
        functions[RELEASE_DOMAIN] = self._function(self._release_domain, None, pointer)
        table = (pointer * NUM_ENTRIES)()
        for entry, function in functions.items():
            table[entry] = ctypes.cast(function, pointer).value
        get_api = self._function(
            lambda asked: ctypes.addressof(table) if asked <= version else None, pointer, ctypes.c_uint32
        )
        get_version = self._function(lambda: ctypes.addressof(self._version), pointer)
        self._version = ctypes.create_string_buffer(f"1.{version}.0".encode())
        self._base = (pointer * 2)(*(ctypes.cast(function, pointer).value for function in (get_api, get_version)))
        self._kept = functions, table, get_api, get_version
        self._register = ctypes.CDLL(str(library)).RegisterCustomOps
        self._register.restype = pointer

    @staticmethod
    def _function(call: Callable[..., Any], *types: Any) -> Any:
        return ctypes.CFUNCTYPE(*types)(call)

    def register(self) -> bool:
        """Whether it did without an error."""
        return self._register(ctypes.c_void_p(1), self._base) is None

    def _create_status(self, _code: int, message: bytes) -> int:
        self.said.append(message.decode())
        return 1

    def _create_domain(self, _name: bytes, made: Any) -> None:
        self.calls.append("create")
        made[0] = DOMAIN
        time.sleep(0.05)  # others come meanwhile

    def _add_operator(self, _domain: int, _operator: int) -> int | None:
        self._num_added += 1
        if self._num_added == self.failing:
            return 1
        self.calls.append("operator")
        return None

    def _add_domain(self, _options: int, domain: int) -> None:
        assert domain == DOMAIN
        self.calls.append("use")

    def _release_domain(self, domain: int) -> None:
        assert domain == DOMAIN
        self.calls.append("release")


@pytest.fixture
def library(cpu_library: Path, tmp_path: Path) -> Path:
    """Not loaded before."""
    return Path(shutil.copy(cpu_library, tmp_path))


def test_all_sessions_share_one_domain(library: Path) -> None:
    runtime = Runtime(library)
    assert [runtime.register(), runtime.register()] == [True, True]
    assert runtime.calls == ["create", *["operator"] * NUM_OPERATORS, "use", "use"]


def test_sessions_that_are_made_at_once_share_one_domain_too(library: Path) -> None:
    runtime = Runtime(library)
    threads = [threading.Thread(target=runtime.register) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runtime.calls == ["create", *["operator"] * NUM_OPERATORS, *["use"] * 3]


def test_a_domain_that_could_not_be_filled_is_not_used(library: Path) -> None:
    runtime = Runtime(library, failing=3)
    assert not runtime.register()
    assert runtime.calls == ["create", "operator", "operator", "release"]
    assert runtime.register()
    assert runtime.calls[4:] == ["create", *["operator"] * NUM_OPERATORS, "use"]


def test_an_older_onnx_runtime_is_refused_with_the_version_that_is_needed(library: Path) -> None:
    runtime = Runtime(library, version=27)
    assert not runtime.register()
    assert runtime.said == ["fly-trt's CPU kernels need ONNX Runtime 1.28 or later, this is 1.27.0"]
    assert runtime.calls == []
