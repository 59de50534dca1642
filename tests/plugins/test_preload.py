"""A program that loads no plugins has them all the same, where the library is preloaded and asked to register itself.

A stand-in for libnvinfer has a registry that a static initialiser makes, as the real one may; only g++ and TensorRT's
headers (TENSORRT_ROOT or the system's) are needed.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "plugins/preload.cpp"
# As much of CUDA's header as TensorRT's headers need.
CUDA = "typedef struct CUstream_st* cudaStream_t; typedef struct CUevent_st* cudaEvent_t;"
HEADERS = [f"{root}/include"] if (root := os.environ.get("TENSORRT_ROOT")) else []
NVINFER = """
#include <NvInferRuntime.h>
#include <cstdio>
#include <string>
static std::string* const made = new std::string("made");  // null until the library is initialised
struct Registry : nvinfer1::IPluginRegistry {
    using Name = nvinfer1::AsciiChar const* const;
    bool registerCreator(nvinfer1::IPluginCreator&, Name) noexcept override { return false; }
    nvinfer1::IPluginCreator* const* getPluginCreatorList(int32_t* const) const noexcept override { return nullptr; }
    nvinfer1::IPluginCreator* getPluginCreator(Name, Name, Name) noexcept override { return nullptr; }
    void setErrorRecorder(nvinfer1::IErrorRecorder* const) noexcept override {}
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool deregisterCreator(nvinfer1::IPluginCreator const&) noexcept override { return false; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool const) override {}
    PluginLibraryHandle loadLibrary(nvinfer1::AsciiChar const* path) noexcept override {
        std::printf("%s %s\\n", made == nullptr ? "uninitialised" : made->c_str(), path);
        return FAILS ? nullptr : this;
    }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    bool registerCreator(nvinfer1::IPluginCreatorInterface&, Name) noexcept override { return false; }
    nvinfer1::IPluginCreatorInterface* const* getAllCreators(int32_t* const) const noexcept override { return nullptr; }
    nvinfer1::IPluginCreatorInterface* getCreator(Name, Name, Name) noexcept override { return nullptr; }
    bool deregisterCreator(nvinfer1::IPluginCreatorInterface const&) noexcept override { return false; }
    nvinfer1::IPluginResource* acquirePluginResource(nvinfer1::AsciiChar const*,
        nvinfer1::IPluginResource*) noexcept override { return nullptr; }
    int32_t releasePluginResource(nvinfer1::AsciiChar const*) noexcept override { return 0; }
    nvinfer1::IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const) noexcept override {
        return nullptr;
    }
};
extern "C" nvinfer1::IPluginRegistry* getPluginRegistry() noexcept {
    static Registry registry;
    return &registry;
}
"""
WITH_NVINFER = 'extern "C" void* getPluginRegistry(); int main() { return getPluginRegistry() == nullptr; }'


def compile_cpp(folder: Path, name: str, text: str | Path, *options: str) -> Path:
    source = text if isinstance(text, Path) else folder / f"{name}.cpp"
    if isinstance(text, str):
        source.write_text(text)
    (folder / "cuda_runtime_api.h").write_text(CUDA)
    includes = [f"-isystem{path}" for path in (folder, *HEADERS)]
    flags = ("-std=c++17", "-Wno-deprecated-declarations", *includes)
    command = ["g++", *flags, str(source), "-o", str(folder / name), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if "NvInferRuntime.h: No such file" in done.stderr:
        pytest.skip("no TensorRT headers: set TENSORRT_ROOT")
    if done.returncode and "does not override" in done.stderr:
        pytest.skip("the stand-in's registry is TensorRT 10.14's, and the headers are of another version")
    assert done.returncode == 0, done.stderr
    return folder / name


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs with a stand-in for libnvinfer, with one that refuses, and without, beside the library to preload."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("preload")
    warnings = ("-Wall", "-Wextra", "-Werror")
    compile_cpp(folder, "libpreload.so", SOURCE, "-shared", "-fPIC", "-ldl", *warnings)
    for name, fails in (("with", "false"), ("refusing", "true")):
        own = folder / name
        own.mkdir()
        compile_cpp(own, "libnvinfer.so", NVINFER, "-shared", "-fPIC", f"-DFAILS={fails}")
        linked = ("-L", str(own), "-lnvinfer", f"-Wl,-rpath,{own}", "-Wl,--no-as-needed")
        compile_cpp(own, "program", WITH_NVINFER, *linked)
    compile_cpp(folder, "without", "int main() { return 0; }")
    return folder


def run(program: Path, library: Path, **variables: str) -> tuple[str, str]:
    environment = {"PATH": os.environ["PATH"], "LD_PRELOAD": str(library), **variables}
    done = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_program_that_loads_no_plugins_has_them_before_it_begins(built: Path) -> None:
    library = built / "libpreload.so"
    said, _ = run(built / "with" / "program", library, FLY_PLUGINS_REGISTER="1")
    assert said == f"made {library}\n", "the registry is there, and asked once"


def test_nothing_happens_where_nobody_asks_or_without_tensorrt(built: Path) -> None:
    library = built / "libpreload.so"
    assert run(built / "with" / "program", library) == ("", "")
    assert run(built / "without", library, FLY_PLUGINS_REGISTER="1") == ("", "")


def test_a_registry_that_refuses_is_said(built: Path) -> None:
    library = built / "libpreload.so"
    _, errors = run(built / "refusing" / "program", library, FLY_PLUGINS_REGISTER="1")
    assert errors == f"{library}: TensorRT's registry does not take the plugins\n"
