"""Three shops train a classifier of tickets together; none shows its tickets to the others.

python examples/run_from_python.py
"""

import random

import fedllm

WORDS = {
    "billing": ["invoice", "refund", "charged twice", "credit card", "receipt"],
    "delivery": ["parcel", "courier", "late", "tracking number", "wrong address"],
    "account": ["password", "login", "delete my profile", "two factors", "locked out"],
}


def tickets(count: int, seed: int) -> list[dict[str, str]]:
    """Make up some tickets; yours are a list like this, a pandas frame or a datasets.Dataset."""
    draw = random.Random(seed)
    queues = [draw.choice(list(WORDS)) for _ in range(count)]
    texts = [f"{', '.join(draw.sample(WORDS[queue], 3))} (order {draw.randrange(10**6)})" for queue in queues]
    return [{"body": body, "queue": queue} for body, queue in zip(texts, queues, strict=True)]


shops = [tickets(80, seed=shop) for shop in range(3)]
run = fedllm.simulate(
    "quickstart",
    rounds=3,
    clients=shops,
    data={"text": "body", "label": "queue", "test_rows": tickets(60, seed=3)},
    name="tickets",
)

for record in run.rounds:
    print(f"round {record['round']}: accuracy {record['accuracy']:.3f}, {record['bytes_up']:,} bytes up")
for answer in run.predict(["my parcel never came", "I cannot log in"]):
    print(f"{answer['text']!r} goes to {answer['label']}")
