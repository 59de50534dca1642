"""Every name, keyword and signature of TensorRT-LLM that is used here, and where it was read.

The code beside this table imports nothing that is not in it, and `tools/check_tensorrt_llm.py` holds it against a
source tree or an installed package: what a user's upgrade broke is then one command away. It knows text alone.
"""

from dataclasses import dataclass
from typing import Literal

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


ACCEPTANCE: tuple[Name, ...] = ()
LLM_API: tuple[Name, ...] = ()
SERVE: tuple[Name, ...] = ()
BUILD: tuple[Name, ...] = ()
EXECUTOR: tuple[Name, ...] = ()
PLUGIN: tuple[Name, ...] = ()

NAMES: tuple[Name, ...] = (*ACCEPTANCE, *LLM_API, *SERVE, *BUILD, *EXECUTOR, *PLUGIN)
