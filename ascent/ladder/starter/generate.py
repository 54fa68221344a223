"""Writes synthetic data for the use case, so that it can be climbed before there are any data of one's own.

Every message is a problem, said in a wording, with or without a sign of how urgent it is. The lists are the facts.
The test set has problems, wordings and signs of urgency that training never shows: what it measures is not memory.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TRAIN_ROWS, PROMPT_ROWS, TEST_ROWS = 600, 160, 320

TRAIN_PROBLEMS = {
    "billing": [
        "I was charged twice for one order",
        "the invoice shows the wrong VAT number",
        "my card was declined although there is money on it",
        "a discount code was not taken off the total",
        "I need a copy of last month's invoice",
        "the price at checkout was higher than on the page",
        "I was billed for a subscription that I had cancelled",
        "my gift card balance is not accepted as payment",
        "I paid by bank transfer and the order still counts as unpaid",
        "the invoice is addressed to our old company",
        "shipping costs were added although it said free",
        "I want to pay by direct debit instead of card",
        "the payment was taken from the wrong card",
        "which ways to pay do you offer",
    ],
    "delivery": [
        "the parcel has not arrived",
        "the tracking has not moved for four days",
        "the courier left the box at the wrong house",
        "only half of the order was in the box",
        "the parcel is marked as delivered but nobody got it",
        "please send the parcel to another address",
        "the driver did not ring the bell",
        "can the order be shipped to a pick-up point",
        "the delivery date moved for the third time",
        "the shipment is in a city that I do not live in",
        "I will be away on the delivery day",
        "the parcel is stuck at customs",
        "the order has not been shipped yet",
        "how long does shipping to an island take",
    ],
    "returns": [
        "the shoes are too small and I want to send them back",
        "the lamp arrived with a crack",
        "I received a blue jacket instead of a black one",
        "how do I get a return label",
        "how many days do I have to send something back",
        "I would like to swap the shirt for a larger one",
        "the kettle stopped working after a week",
        "the zip of the bag is broken",
        "I changed my mind about the headphones",
        "the glass was in pieces when I opened the box",
        "the colour looks nothing like the picture and I want to return it",
        "a screw is missing from the shelf",
        "I sent the trousers back two weeks ago and heard nothing",
        "the phone case does not fit and I want another one",
    ],
    "account": [
        "I cannot log in",
        "the password reset mail never comes",
        "please change my e-mail address",
        "I want to delete my account",
        "somebody else has used my account",
        "my account is locked",
        "the confirmation code for signing in does not arrive",
        "please merge my two accounts",
        "my name is spelled wrong in the profile",
        "I want to stop the newsletter",
        "how do I add a colleague to our account",
        "I lost the phone that I use for the second factor",
        "my loyalty points are gone from the profile",
        "please correct my date of birth",
    ],
    "technical": [
        "the app crashes when I open the basket",
        "the search on the website finds nothing",
        "the website is blank on my phone",
        "the page loads for a minute and then fails",
        "pictures of the products do not show",
        "the basket empties itself",
        "the filter for sizes does nothing",
        "the app does not start after the update",
        "the checkout button cannot be pressed",
        "I get error 500 on every page",
        "the chat window covers the menu",
        "the site shows the wrong language",
        "push messages come ten times",
        "the map on the store page is grey",
    ],
}

TEST_PROBLEMS = {
    "billing": [
        "the amount on my statement does not match the receipt",
        "you took the money but no invoice came",
        "the tax on the bill is wrong",
        "my voucher was only counted for one item",
        "the instalment was collected a week early",
        "I need the receipt with our company name on it",
        "an unknown charge from your shop is on my credit card",
        "I was billed in the wrong currency",
    ],
    "delivery": [
        "the van never came in the announced time slot",
        "the courier says that my street does not exist",
        "where is my shipment",
        "please leave the parcel with my neighbour",
        "the carrier took the box back to the warehouse",
        "the second parcel of my order is missing",
        "the pick-up shop cannot find my package",
        "the tracking number is not known to the courier",
    ],
    "returns": [
        "the blender smells burnt and I want another one",
        "you sent me two left gloves",
        "I want to exchange the dress for size M",
        "where do I send an item that I do not want",
        "the watch strap came apart on the first day",
        "the book has pages missing",
        "may I give the unopened toy back",
        "the chair leg is bent and I need a replacement",
    ],
    "account": [
        "I forgot which e-mail I registered with",
        "it says that my user name is already taken",
        "please send me all data that you hold about me",
        "signing in asks for an old phone number",
        "I no longer want to receive your mails",
        "my profile shows the orders of a stranger",
        "I need to give our new employee access",
        "please close my customer profile",
    ],
    "technical": [
        "the screen freezes when I scroll",
        "your site says that its certificate has expired",
        "the video on the product page will not play",
        "links in the menu lead nowhere",
        "the app drains my battery",
        "the form on the website rejects what I type",
        "the page jumps back to the top all the time",
        "the dark mode makes the text unreadable",
    ],
}

TRAIN_SIGNS = {
    "high": [
        "This is urgent.",
        "We cannot work until this is solved.",
        "I need an answer today.",
        "Our event is tomorrow.",
        "Please act at once.",
        "It is costing us money every hour.",
        "This cannot wait.",
        "I need help immediately!",
    ],
    "normal": ["", "", "Thank you.", "Please let me know.", "What can I do?", "Can you help?", "Many thanks."],
    "low": [
        "No hurry.",
        "Whenever you have time.",
        "It is not important.",
        "This can wait until next month.",
        "Take your time.",
        "Only a small thing, nothing pressing.",
        "It is not urgent.",
        "An answer next week is early enough.",
    ],
}

TEST_SIGNS = {
    "high": [
        "I need help within the hour.",
        "Everything here stands still because of it.",
        "Please call me right now.",
        "My flight leaves tonight, so be quick.",
        "As soon as humanly possible, please.",
    ],
    "normal": ["", "Could you have a look?", "Looking forward to your reply.", "Kind regards.", "Please advise."],
    "low": [
        "There is no rush at all.",
        "Any time this year is fine.",
        "Low priority from our side.",
        "Do this when you are less busy.",
        "Nothing urgent.",
    ],
}

TRAIN_WORDINGS = [
    "{problem}. {sign}",
    "Hello, {problem}. {sign}",
    "Hi, {problem}. {sign}",
    "Dear team, {problem}. {sign}",
    "Good morning, {problem}. {sign}",
    "Order {number}: {problem}. {sign}",
    "{sign} {problem}.",
    "{problem} - {sign}",
]

TEST_WORDINGS = [
    "Good evening. About order {number}: {problem}. {sign}",
    "To the support desk: {problem}. {sign}",
    "{sign} The matter: {problem}.",
    "hey, {problem}... {sign}",
]

Row = dict[str, Any]


def generate(folder: Path, seed: int) -> None:
    """Write train, prompts, test and examples as JSONL into `folder`; files that are there already are kept."""
    rng = random.Random(seed)
    train = _rows(rng, TRAIN_ROWS + PROMPT_ROWS, TRAIN_PROBLEMS, TRAIN_SIGNS, TRAIN_WORDINGS, "train")
    test = _rows(rng, TEST_ROWS, TEST_PROBLEMS, TEST_SIGNS, TEST_WORDINGS, "test")
    shots = [next(row for row in train if row["expected"]["urgency"] == sign) for sign in ("high", "normal", "low")]
    task = ("id", "input", "expected", "group")
    _write(folder / "train.jsonl", train[:TRAIN_ROWS], (*task, "target"))
    _write(folder / "prompts.jsonl", train[TRAIN_ROWS:], task)
    _write(folder / "test.jsonl", test, task)
    _write(folder / "examples.jsonl", shots, ("id", "input", "target"))


def _rows(
    rng: random.Random,
    count: int,
    problems: dict[str, list[str]],
    signs: dict[str, list[str]],
    wordings: list[str],
    name: str,
) -> list[Row]:
    """Return `count` different messages; queues and urgencies are equally frequent."""
    rows: list[Row] = []
    seen: set[str] = set()
    queues, urgencies = list(problems), list(signs)
    while len(rows) < count:
        queue = queues[len(rows) % len(queues)]
        urgency = urgencies[len(rows) // len(queues) % len(urgencies)]
        problem = rng.choice(problems[queue])
        message = _message(rng, problem, rng.choice(signs[urgency]), rng.choice(wordings))
        letters = "".join(letter for letter in message.casefold() if letter.isalpha())
        if letters in seen:  # case, punctuation and order numbers do not make another example
            continue
        seen.add(letters)
        expected = {"queue": queue, "urgency": urgency}
        rows.append(
            {
                "id": f"{name}-{len(rows):04d}",
                "input": {"message": message},
                "target": json.dumps(expected),
                "expected": expected,
                "group": problem,
            }
        )
    rng.shuffle(rows)
    return rows


def _message(rng: random.Random, problem: str, sign: str, wording: str) -> str:
    """Return a message as somebody might type it."""
    text = wording.format(problem=problem, sign=sign, number=rng.randint(1000, 9999)).strip(" -")
    text = text[:1].upper() + text[1:]
    if rng.random() < 0.3:
        text = text.lower()
    if rng.random() < 0.2:
        text = text.rstrip(".!?")
    return _typo(rng, text) if rng.random() < 0.25 else text


def _typo(rng: random.Random, text: str) -> str:
    """Swap two neighbouring letters inside a longer word."""
    words = text.split(" ")
    places = [at for at, word in enumerate(words) if len(word) > 5 and word.isalpha()]
    if not places:
        return text
    at = rng.choice(places)
    word = words[at]
    cut = rng.randint(1, len(word) - 3)
    words[at] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
    return " ".join(words)


def _write(file: Path, rows: list[Row], fields: tuple[str, ...]) -> None:
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({field: row[field] for field in fields}, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
