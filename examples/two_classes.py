"""Write train.jsonl and test.jsonl: six words of a sentence each, from BBC articles of two classes.

No article is in both. No preset was tuned for them; docs/models-and-data.md says what comes of it.

python examples/two_classes.py        # 1,020 texts of each class to learn from, 1,000 to be tested on
python examples/two_classes.py 20     # of entertainment a twentieth as many; tested on 2,500 of tech
"""

import json
import random
import re
import sys
from pathlib import Path

from fedllm import tasks
from fedllm.config import RunConfig
from fedllm.data.corpus import load

times = int(sys.argv[1]) if len(sys.argv) > 1 else 1
config = RunConfig()
bbc = load(config.data, tasks.of(config))
articles: dict[str, list[str]] = {name: [] for name in ("business", "politics", "tech", "entertainment")}
assert bbc.labels is not None
for article, number in zip(bbc.texts, bbc.labels, strict=True):
    if (name := bbc.label_names[number]) in articles and article not in articles[name]:
        articles[name].append(article)
pick = random.Random(5)
for texts in articles.values():
    pick.shuffle(texts)
pick = random.Random(6)


def sixes(name: str, first: float, last: float, count: int) -> list[tuple[str, str]]:
    """Draw texts of a class from a share of its articles."""
    texts = articles[name][int(first * len(articles[name])) : int(last * len(articles[name]))]
    bodies = (text.partition("\n")[2] or text for text in texts)
    found = (s.strip() for body in bodies for s in re.split(r"(?<=[.?!])\s+", body))
    sentences = list(dict.fromkeys(s for s in found if len(s.split()) >= 6))
    drawn = [s.split() for s in pick.sample(sentences, count + 40)]
    starts = [pick.randrange(max(1, len(words) - 5)) for words in drawn]
    cut = (" ".join(words[start : start + 6]) for words, start in zip(drawn, starts, strict=True))
    return [(text, name) for text in list(dict.fromkeys(cut))[:count]]


tested = 1000 if times == 1 else 2500  # few of them are of the rare class
for file, first, last, count in [("train.jsonl", 0, 0.6, 1020), ("test.jsonl", 0.6, 1, tested)]:
    rows = sixes("tech", first, last, count) + sixes("entertainment", first, last, count // times)
    random.Random(1).shuffle(rows)
    Path(file).write_text("".join(json.dumps({"text": text, "label": name}) + "\n" for text, name in rows))
