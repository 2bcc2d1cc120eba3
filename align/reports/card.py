"""``README.md``: the model card of a run, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from align.tracking.files import write_text

from .facts import (
    REFERENCES,
    capitalise,
    commands,
    data_rows,
    filter_words,
    is_pal,
    judge,
    method_name,
    model_name,
    notation,
    terms,
    trains_reward,
)
from .measures import interval_words, measures
from .record import RunRecord, read_run

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

USE = """\
from {package} import {model_class}
from transformers import AutoTokenizer

model = {model_class}.from_pretrained({folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
{prompt}
answer = model.generate(**inputs, max_new_tokens={tokens})
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
USE_REWARD = """\
from align.rewards.models import RewardModel

model = RewardModel.from_pretrained({folder!r})
prompt, one, other = "Name a river.", "The Danube.", "No."
print(model.preference([prompt], [one], [other]))  # how likely the first answer is preferred"""
CHAT_PROMPT = """\
messages = [{"role": "user", "content": "Suggest a name for a small bakery."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
PLAIN_PROMPT = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'


USE_PAL = """\
from align.rewards.pal_model import PalRewardModel

# The mean over known annotators; or annotator:NAME of one of them.
model = PalRewardModel.from_pretrained({folder!r}).choose("mean")
print(model.rewards(["How do I boil an egg?"], ["Boil it for eight minutes."]))"""


def write_card(run: Path) -> Path:
    """Write the model card into a run folder. What was not measured is not claimed.

    Args:
        run: a run folder, whatever its state.

    Returns:
        The path of ``README.md``.

    Raises:
        AlignError: the folder is no run, or a file in it is broken.
    """
    record = read_run(run)
    environment = Environment(
        loader=PackageLoader("align.reports", package_path=""),
        autoescape=False,  # Markdown; the card holds no text of models or data, only names, in code marks
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    environment.filters["capitalise"] = capitalise
    status = record.manifest.get("status")
    data = record.section("data")
    text = environment.get_template("card.md.j2").render(
        front_matter=yaml.safe_dump(_front_matter(record), sort_keys=False, allow_unicode=True).strip(),
        title=f"{method_name(record.recipe)} on {Path(model_name(record)).name}",
        note="" if status == "finished" else f"This run did not finish (status: {status}).",
        model=model_name(record),
        method=method_name(record.recipe),
        align=record.manifest.get("align") or "",
        made_from=_made_from(record),
        terms=terms(record.recipe),
        notation=notation(record.recipe),
        reference=REFERENCES.get(record.section("reference").get("kind", ""), ""),
        data=list(data),
        data_rows=data_rows(data),
        filtered=filter_words(record),
        measures=measures(record),
        intervals=interval_words(record),
        commands=commands(record),
        snippets=_snippets(record),
        limits=_limits(record),
    )
    target = run / "README.md"
    write_text(target, re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", text)).rstrip() + "\n")
    return target


def _made_from(record: RunRecord) -> str:
    if is_pal(record.recipe):
        return "A reward model of several annotators, on"
    return "A LoRA adapter for" if (record.path / "adapter").is_dir() else "A fine-tuned version of"


def _front_matter(record: RunRecord) -> dict[str, Any]:
    """The hub's fields; one that is not known is left out and not guessed."""
    model, has_adapter = record.section("model"), (record.path / "adapter").is_dir()
    fields: dict[str, Any] = {}
    if base := model.get("base_model") or _hub_id(model_name(record)):
        fields["base_model"] = base
    fields["library_name"] = "peft" if has_adapter else "transformers"
    if model.get("license"):
        fields["license"] = model["license"]
    if is_pal(record.recipe):
        fields["library_name"] = "align-lm"
    else:
        fields["pipeline_tag"] = "text-classification" if trains_reward(record.recipe) else "text-generation"
    fields["tags"] = ["align", "preference-alignment", *(term.name for term in terms(record.recipe))]
    fields["tags"] += ["lora"] if has_adapter else []
    sources = (str(part.get("source", "")) for part in record.section("data").values())
    if datasets := sorted({found for source in sources if (found := _hub_id(source))}):
        fields["datasets"] = datasets
    return fields


def _hub_id(name: str) -> str | None:
    """The name, if it can be one on the hub: ``owner/name``, and no file of that name here."""
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _snippets(record: RunRecord) -> list[str]:
    if trains_reward(record.recipe):
        folder = Path(record.output) / "model"
        return [USE_REWARD.format(folder=str(folder))] if (record.path / "model").is_dir() else []
    if is_pal(record.recipe):
        folder = Path(record.output) / "model"
        return [USE_PAL.format(folder=str(folder))] if (record.path / "model").is_dir() else []
    tokens = (record.recipe.get("generation") or {}).get("max_new_tokens", 96)
    kinds = (
        ("merged", "transformers", "AutoModelForCausalLM"),
        ("adapter", "peft", "AutoPeftModelForCausalLM"),
        ("model", "transformers", "AutoModelForCausalLM"),
    )
    return [
        USE.format(
            package=package,
            model_class=model_class,
            folder=str(Path(record.output) / name),
            prompt=CHAT_PROMPT if _has_template(record.path / name) else PLAIN_PROMPT,
            tokens=tokens,
        )
        for name, package, model_class in kinds
        if (record.path / name).is_dir()
    ][:1]


def _has_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    in_config = config.exists() and '"chat_template"' in config.read_text(encoding="utf-8")
    return in_config or (folder / "chat_template.jinja").exists()


def _limits(record: RunRecord) -> list[str]:
    limits = []
    if train := record.section("data").get("train"):
        limits.append(f"Trained on `{train.get('source')}` alone; other kinds of prompts were not looked at.")
    if scored := judge(record):
        limits.append(f"The win rate is by the function `{scored}`, not by people: it sees what that function sees.")
    if measures(record):
        limits.append("The numbers above are all that was measured: nothing here speaks of truth, safety or bias.")
    else:
        limits.append("Nothing was measured on held-out data: look at the answers before you use it.")
    limits.append("Faults of the base model may remain, and its licence goes on to apply.")
    return limits
