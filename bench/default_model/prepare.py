"""Builds the default model's corpus and tokenizer: CPython's own standard library in, token streams out.

Run first, by hand: `python bench/default_model/prepare.py --work .train --out engine/data/default_model`. It writes
the tokenizer and chat template to --out, and to --work one uint16 stream per source (`lib`, `tests`, `chat`, `val`,
`heldout`; each document is preceded by <|endoftext|>) with `corpus.json`, which holds the counts and the text of the
held-out files.
Always true: a file's path alone decides its split; held-out and validation files never reach the tokenizer's
training, the training streams or the chat examples, and a near copy of a trained file is dropped; all text is
CPython's (PSF-2.0) or this folder's `own_lines.py`.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import random
import re
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from own_lines import ASKS, EXERCISES, SMALL_TALK
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [
    END_OF_TEXT,
    IM_START,
    IM_END,
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|tool_call|>",
    "<|pad|>",
]
VOCAB_SIZE = 4096

# Words with one leading space, digits one by one, punctuation, newlines together with blank lines, then whole runs
# of spaces: an indentation is one token of its own, so a prompt may stop before it or after it.
SPLIT_PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*\n| {2,}|\s"

CHAT_TEMPLATE = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}
TEST_FOLDERS = {"test", "tests", "idle_test"}
SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are twinfer's default model.",
    "You write Python.",
    "Answer briefly.",
]
MAX_CODE_CHARS, MAX_DOC_CHARS = 1600, 600

VERBS = {
    w: w.lower() + "s"
    for w in [
        "Return",
        "Create",
        "Convert",
        "Write",
        "Read",
        "Open",
        "Add",
        "Remove",
        "Print",
        "Set",
        "Get",
        "Parse",
        "Call",
        "Raise",
        "Compute",
        "Find",
        "Decode",
        "Encode",
        "Yield",
        "Send",
        "Close",
        "Run",
        "Format",
        "Generate",
        "Wait",
        "Load",
        "Make",
        "Build",
        "Replace",
        "Start",
        "Stop",
        "Insert",
        "Delete",
        "Test",
    ]
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of the standard library."""

    name: str  # path relative to the standard library's folder, with '/'
    text: str
    is_test: bool

    @property
    def split(self) -> str:
        """`heldout` and `val` for 3 % and 2 % of the non-test files by hash of the name; else the stream that
        trains on it.
        """
        if self.is_test:
            return "tests"
        bucket = int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 100
        return "heldout" if bucket < 3 else "val" if bucket < 5 else "lib"


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function or method of the standard library, as the chat examples quote it."""

    qualified_name: str
    signature: str
    code: str
    doc: str


def read_sources(stdlib: Path) -> Iterator[Source]:
    """Every parseable Python file once, without generated tables (code pages, platform data) and files that are
    mostly data.
    """
    seen: set[str] = set()
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).parts
        if SKIPPED_FOLDERS & set(parts) or path.name.startswith("_sysconfigdata") or parts[0] == "pydoc_data":
            continue
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
            ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        letters = sum(c.isascii() and (c.isalpha() or c in " \n_") for c in text)
        if len(text) < 200 or text in seen or "decoding_table" in text or letters < 0.62 * len(text):
            continue
        seen.add(text)
        yield Source(name="/".join(parts), text=text, is_test=bool(TEST_FOLDERS & set(parts)))


def copied_share(source: Source, known_lines: set[str]) -> float:
    """The share of a file's longer lines that stand word for word in files that are trained on."""
    lines = [line.strip() for line in source.text.split("\n") if len(line.strip()) > 20]
    return sum(line in known_lines for line in lines) / max(1, len(lines))


def functions_of(source: Source) -> Iterator[Function]:
    """The functions of a file that have a docstring or are long enough to be worth quoting."""
    module = source.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    lines = source.text.split("\n")

    def walk(node: ast.AST, prefix: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}.{child.name}")
            elif isinstance(child, ast.FunctionDef):
                first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                code = textwrap.dedent("\n".join(lines[first - 1 : child.end_lineno]))
                yield Function(
                    qualified_name=f"{prefix}.{child.name}",
                    signature=f"{child.name}({ast.unparse(child.args)})",
                    code=code.strip(),
                    doc=clip(ast.get_docstring(child) or ""),
                )
            elif isinstance(child, (ast.If, ast.Try)):
                yield from walk(child, prefix)

    yield from walk(ast.parse(source.text), module)


def clip(doc: str) -> str:
    """Whole leading paragraphs of a docstring, up to MAX_DOC_CHARS."""
    kept = ""
    for paragraph in doc.strip().split("\n\n"):
        if len(kept) + len(paragraph) > MAX_DOC_CHARS:
            break
        kept += paragraph + "\n\n"
    return kept.strip()


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def function_exchanges(function: Function, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Questions and answers about one function: at most two, so that no function dominates."""
    if len(function.code) > MAX_CODE_CHARS or function.code.count("\n") < 1:
        code_forms: list[tuple[str, str]] = []
    else:
        lines = function.code.split("\n")
        cut = rng.randrange(1, len(lines)) if len(lines) > 2 else 1
        code_forms = [
            (f"Complete this code:\n{fenced(chr(10).join(lines[:cut]))}", fenced(function.code)),
            (f"Show me the source of `{function.qualified_name}`.", fenced(function.code)),
        ]
        summary = function.doc.split("\n\n")[0].replace("\n", " ").strip()
        if summary:
            verb, _, rest = summary.partition(" ")
            if verb in VERBS:
                ask = f"Write a Python function `{function.signature}` that {VERBS[verb]} {rest}"
            else:
                ask = f"Write a Python function `{function.signature}`: {summary}"
            code_forms += [(ask, fenced(function.code))] * 3
    if code_forms:
        yield rng.choice(code_forms)
    if len(function.doc) > 20:
        ask = rng.choice(
            ["What does `{}` do?", "What does {} do?", "Explain `{}`.", "What is `{}` for?", "Describe `{}`."]
        )
        yield ask.format(function.qualified_name), function.doc


def is_written_in_c(value: object) -> bool:
    if not callable(value) or hasattr(value, "__code__"):
        return False
    try:
        inspect.getsource(value)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return not isinstance(value, type) or "__dict__" not in vars(value) or value.__module__ == "builtins"
    return False


def builtin_exchanges(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Questions about what is written in C: its docstrings are in the interpreter itself, in no file that could be
    held out.
    """
    seen: set[str] = set()
    for module_name in ["builtins", *sorted(sys.stdlib_module_names - {"antigravity", "this", "builtins"})]:
        if module_name.startswith("_") or module_name in ("idlelib", "turtledemo", "tkinter", "turtle"):
            continue
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        for name, value in sorted(vars(module).items(), key=lambda item: item[0]):
            if name.startswith("_"):
                continue
            members = [(f"{module_name}.{name}".removeprefix("builtins."), value)]
            if isinstance(value, type) and module_name in ("builtins", "collections", "datetime"):
                members += [
                    (f"{name}.{key}", member) for key, member in sorted(vars(value).items()) if not key.startswith("_")
                ]
            for full_name, member in members:
                doc = clip(str(getattr(member, "__doc__", "") or ""))
                if is_written_in_c(member) and len(doc) > 30 and doc not in seen:
                    seen.add(doc)
                    yield rng.choice(["What does `{}` do?", "Explain `{}`.", "What is `{}`?"]).format(full_name), doc


def topic_texts(stdlib: Path) -> dict[str, str]:
    """The language reference that `help()` shows, by topic."""
    topics: dict[str, str] = {}
    exec((stdlib / "pydoc_data" / "topics.py").read_text(encoding="utf-8"), topics)  # the file only assigns one dict
    return dict(topics["topics"])  # type: ignore[call-overload]


def chat_documents(sources: list[Source], stdlib: Path, rng: random.Random) -> list[str]:
    """All chat examples, rendered with the chat template's format; some have a system prompt, some several turns."""
    exchanges = [
        pair for source in sources for function in functions_of(source) for pair in function_exchanges(function, rng)
    ]
    exchanges += builtin_exchanges(rng)
    exchanges += [
        (f"Explain {name} in Python.", clip(text)) for name, text in topic_texts(stdlib).items() if clip(text)
    ]
    exchanges = [(ask, answer.strip()) for ask, answer in dict.fromkeys(exchanges) if answer.strip()]
    for _ in range(6):
        exchanges += [(ask, answer) for asks, answer in SMALL_TALK for ask in asks]
    exchanges += [(ask.format(does), fenced(code)) for does, code in EXERCISES for ask in ASKS for _ in range(2)]
    rng.shuffle(exchanges)
    documents = []
    while exchanges:
        turns = [exchanges.pop() for _ in range(min(len(exchanges), rng.choice([1, 1, 1, 1, 2, 3])))]
        text = f"{IM_START}system\n{rng.choice(SYSTEM_PROMPTS)}{IM_END}\n" if rng.random() < 0.3 else ""
        for ask, answer in turns:
            text += f"{IM_START}user\n{ask}{IM_END}\n{IM_START}assistant\n{answer}{IM_END}\n"
        documents.append(text)
    return documents


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        max_token_length=32,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"tokenizer has {tokenizer.get_vocab_size()} entries, expected {VOCAB_SIZE}")
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """The tokenizer's three files, as `AutoTokenizer` and other readers of such folders expect them."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": "<|pad|>",
        "unk_token": None,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(i): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for i, token in enumerate(SPECIAL_TOKENS)
        },
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_stream(tokenizer: Tokenizer, texts: list[str], path: Path) -> int:
    """Writes u16 [num_tokens], each document preceded by <|endoftext|>; returns num_tokens."""
    end_of_text_id = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids.append(end_of_text_id)
        ids.extend(encoding.ids)
    np.save(path, np.array(ids, dtype=np.uint16))
    return len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".train"))
    parser.add_argument("--out", type=Path, default=Path("engine/data/default_model"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # old sources: invalid escapes, deprecated modules
    args.work.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    by_split: dict[str, list[Source]] = {"lib": [], "tests": [], "val": [], "heldout": []}
    for source in read_sources(stdlib):
        by_split[source.split].append(source)
    library_lines = {line.strip() for source in by_split["lib"] + by_split["tests"] for line in source.text.split("\n")}
    for split in ("val", "heldout"):
        by_split[split] = [source for source in by_split[split] if copied_share(source, library_lines) < 0.4]
    texts = {split: [source.text for source in sources] for split, sources in by_split.items()}
    texts["lib"] += topic_texts(stdlib).values()
    texts["chat"] = chat_documents(by_split["lib"], stdlib, rng)

    # The library counts most for the tokenizer; of the tests a third is enough to know their words.
    tokenizer = train_tokenizer(
        texts["lib"] + texts["tests"][::3] + [re.sub(r"<\|\w+\|>", "", text) for text in texts["chat"]]
    )
    write_tokenizer(tokenizer, args.out)
    report: dict[str, object] = {"python": sys.version.split()[0]}
    for split, documents in texts.items():
        num_tokens = write_stream(tokenizer, documents, args.work / f"{split}.npy")
        num_bytes = sum(len(text.encode()) for text in documents)
        report[split] = {"documents": len(documents), "bytes": num_bytes, "tokens": num_tokens}
        print(
            f"{split:8} {len(documents):6} documents {num_bytes:10} bytes {num_tokens:9} tokens "
            f"{num_bytes / num_tokens:.2f} bytes/token"
        )
    report["heldout_files"] = {source.name: source.text for source in by_split["heldout"]}
    report["val_names"] = [source.name for source in by_split["val"]]
    (args.work / "corpus.json").write_text(json.dumps(report))
    print("held out:", *[source.name for source in by_split["heldout"]])
    print("validation:", *[source.name for source in by_split["val"]])


if __name__ == "__main__":
    main()
