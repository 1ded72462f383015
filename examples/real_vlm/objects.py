"""Names, for the metric CHAIR, what people saw: the objects of objects.txt that the captions of a row name.

python objects.py TEST.jsonl > test_objects.jsonl
"""

import json
import sys
from pathlib import Path

from cwdpo.metrics.chair import Chair, mentioned

WORDS = Chair(synonyms=str(Path(__file__).with_name("objects.txt"))).words()

with open(sys.argv[1], encoding="utf-8") as rows:
    for line in rows:
        row = json.loads(line)
        row["objects"] = sorted(set().union(*(mentioned(text, WORDS) for text in row["captions"])))
        print(json.dumps(row, ensure_ascii=False))
