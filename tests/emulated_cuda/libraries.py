"""Stand-ins for the CUDA libraries that ONNX Runtime's CUDA provider is linked against, made of cudart.c with gcc.

With their folder on LD_LIBRARY_PATH the provider of the onnxruntime-gpu wheel loads on a machine without a GPU, so that
what it makes of a graph is seen: which node runs where, what is copied, whether a CUDA graph may be captured. usage:
libraries.py PROVIDER_LIBRARY FOLDER
"""

import re
import subprocess
import sys
from pathlib import Path

CUDART = "libcudart.so.13"
VERSIONED = {CUDART, "libcublas.so.13", "libcublasLt.so.13"}
LIBRARIES = {*VERSIONED, "libcurand.so.10", "libcuda.so.1"}
WITHOUT_VERSION = {"libcuda.so.1": ["cuTensorMapEncodeTiled"]}
# Whoever makes one looks at it.
HANDLE_MAKERS = re.compile(r"cublas(Lt)?Create(_v2)?")


def build(provider: Path, folder: Path) -> None:
    """Writes a library for each that `provider` needs, with all the names that it asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = subprocess.run(["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True)
    names = {library: list(WITHOUT_VERSION.get(library, [])) for library in LIBRARIES}
    for name, library in re.findall(r"^\s*[Uw] (\S+?)@(\S+)", listed.stdout, re.MULTILINE):
        if library in names:
            names[library].append(name)
    own = (Path(__file__).parent / "cudart.c").read_text()
    for library, wanted in names.items():
        _compile(folder, library, wanted, own if library == CUDART else "")


def _compile(folder: Path, library: str, names: list[str], code: str) -> None:
    defined = set(re.findall(r"^[\w ]+[ *](\w+)\(.*[){,]$", code, re.MULTILINE)) | set(
        re.findall(r"^[\w ]+[ *]+(\w+)\(.*\) \{", code, re.MULTILINE)
    )
    for name in names:
        if name in defined:
            continue
        if HANDLE_MAKERS.fullmatch(name):
            code += f"\nint {name}(void **made) {{ static int handle; return *made = &handle, 0; }}"
        else:
            code += f"\nlong {name}(void) {{ return 0; }}"
    source, versions = folder / f"{library}.c", folder / f"{library}.map"
    source.write_text(code + "\n")
    versions.write_text(f"{library} {{ global: *; }};\n")
    options = [f"-Wl,--version-script={versions}"] if library in VERSIONED else []
    command = ["gcc", "-shared", "-fPIC", "-w", "-O1", "-o", folder / library, source, f"-Wl,-soname,{library}"]
    subprocess.run([*command, *options], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
