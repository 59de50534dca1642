"""Every name, keyword and signature of TensorRT-LLM that is used here, and where it was read.

The code beside this table imports nothing that is not in it, and `tools/check_tensorrt_llm.py` holds it against a
source tree or an installed package: what a user's upgrade broke is then one command away. It knows text alone.
"""

from dataclasses import dataclass
from typing import Literal

# The module that has the base class of one-model workers, into which FLy is put, and that class's method.
INTERFACE = "tensorrt_llm._torch.speculative.interface"
WORKER = "SpecWorkerBase"
METHOD = "_sample_and_accept_draft_tokens_base"

Part = Literal["acceptance", "llm_api", "serve", "build", "executor", "plugin"]
Sureness = Literal["read", "unverified"]


@dataclass(frozen=True, slots=True)
class Name:
    """A function, class, field, attribute, enumerator or network tensor that `part` of the integration uses.

    file: its path in the source tree, also where an installed package has it elsewhere (bindings). name: dotted, as in
    "SpecWorkerBase._sample_tokens_for_batch"; "" is the file alone. parameters: those that are passed, by name, or with
    `is_whole` all that there are, in this order and with `self`. releases: where it must be: "1.2", "main" or both.
    read_at: the version, or commit, of the text that was read. sureness: "unverified" where no text of a release that
    needs it could be opened.
    """

    part: Part
    file: str
    name: str
    parameters: tuple[str, ...] = ()
    is_whole: bool = False
    releases: tuple[str, ...] = ("1.2", "main")
    read_at: str = ""
    sureness: Sureness = "read"


_INTERFACE_FILE = f"{INTERFACE.replace('.', '/')}.py"
# Two texts: of about January 2026, near 1.2.0, and of mid 2026, on the way to 1.3. Beside neither a version.py.
_NEAR_1_2 = "main, January 2026"
_NEAR_1_3 = "main, mid 2026"
_BOTH = f"{_NEAR_1_2}; {_NEAR_1_3}"
ACCEPTANCE: tuple[Name, ...] = (
    Name(
        "acceptance",
        _INTERFACE_FILE,
        f"{WORKER}.{METHOD}",
        ("self", "logits", "draft_tokens", "num_contexts", "batch_size", "spec_metadata"),
        is_whole=True,
        read_at=_BOTH,
    ),
    Name("acceptance", _INTERFACE_FILE, f"{WORKER}.force_num_accepted_tokens", read_at=_BOTH),
    Name("acceptance", _INTERFACE_FILE, "SpecMetadata.is_spec_dec_tree", read_at=_BOTH),
    Name("acceptance", _INTERFACE_FILE, "SpecMetadata.use_rejection_sampling", releases=("main",), read_at=_NEAR_1_3),
    Name("acceptance", "tensorrt_llm/version.py", "__version__", read_at="1.0.0rc4, 1.3.0rc20"),
)
LLM_API: tuple[Name, ...] = ()
SERVE: tuple[Name, ...] = ()
BUILD: tuple[Name, ...] = ()
EXECUTOR: tuple[Name, ...] = ()
PLUGIN: tuple[Name, ...] = ()

NAMES: tuple[Name, ...] = (*ACCEPTANCE, *LLM_API, *SERVE, *BUILD, *EXECUTOR, *PLUGIN)
