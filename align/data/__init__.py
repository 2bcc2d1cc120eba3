"""Feedback in, token ids out; nothing dropped in silence.

- ``rows.py``         what a row is: ``PairRow``, ``CompletionRow``, ``Fault``, and the hash that names a row.
- ``load.py``         ``read_rows``: JSONL, JSON, CSV, Parquet, a folder of them, a saved dataset, a hub id, or
                      ``align:NAME/SPLIT`` for the small data that the package carries.
- ``fields.py``       what a prompt and an answer may be: text as it stands, or chat messages.
- ``pairs.py``        ``read_pairs``: explicit and implicit prompts, rankings and ratings become pairs with a strength;
                      soft labels where the data have them.
- ``completions.py``  ``read_completions`` for ``method: sft``, and the rows that TRL's SFTTrainer takes.
- ``thumbs.py``       ``read_thumbs``: answers with a thumb up or down, and pairs unpaired, for ``bco`` and ``kto``.
- ``prompts.py``      ``read_prompts`` for ``method: grpo``: prompts, and the reference rewards beside them.
- ``groups.py``       ``read_groups``: K answers to a prompt with what each is worth, for ``gpo`` and ``sppo``.
- ``rewards.py``      pairs and ratings for reward models; ``judgements.py`` pairs with the name of who judged them.
- ``encode.py``       the rules of token ids: BOS once, EOS once, one prompt for both answers, one limit for both.
- ``tokenize.py``     rows to token ids by these rules; ``kept.py`` keeps what many rows became, by what decides it;
                      ``workers.py`` has several processes make it; ``encodings.py`` and ``columns.py`` hold it.
- ``splits.py``       the data sets of a run: the above in one step.
- ``report.py``       what is wrong with the data, what is in it, and which tokens are scored.

Every row is either used or set aside as a ``Fault`` with file, row, field and reason; what is neither (duplicates,
contradictions, cut answers, moved boundaries) has a count. Reading needs no tokenizer; tokenising needs no file.

    table = read_pairs("data/pairs.jsonl")
    check_fraction(table.faults, table.counts["rows"], max_bad_fraction=0.05)
    tokenized = tokenize_pairs(table.rows, tokenizer, max_length=1024)
    dataset = tokenized.dataset()
"""
