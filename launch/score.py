"""Judges any texts, from this program or from another model, under a published scorer.

    python launch/score.py --texts=samples.jsonl
"""

import json
import pathlib
from typing import Any

import cli
from absl import flags

_TEXTS = flags.DEFINE_string("texts", None, "JSON Lines file with `text` in each line.", required=True)
_SCORER = flags.DEFINE_string("scorer", "smollm2", "Scorer: smollm2, a GGUF file, a folder or a hub name.")
_NUM = flags.DEFINE_integer("num", None, "Number of texts to judge, the first ones; default: all.", lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "Tokens of each text to judge, the first ones.", lower_bound=2)
_BATCH = flags.DEFINE_integer("batch", 16, "Texts to score at a time.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")


def main(argv: list[str]) -> None:
    import jax

    from diladiff_jax.evaluation.measures import scorer
    from diladiff_jax.storage import scorers

    with open(_TEXTS.value) as lines:
        texts = [json.loads(line)["text"] for line in lines if line.strip()][: _NUM.value]
    found = scorers.load_scorer(_SCORER.value)
    judge = scorer.Scorer(
        found.network, jax.device_put(found.params), found.tokenizer, batch=_BATCH.value, length=_MAX_TOKENS.value
    )
    result = judge.score(texts)
    print(json.dumps({"scorer": found.origin, "texts": len(texts), "tokens": int(result.counts.sum()), **result.measures()}))


if __name__ == "__main__":
    cli.run(main, __doc__)
