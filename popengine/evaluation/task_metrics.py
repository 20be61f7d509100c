"""Metrics of generated answers: exact match and F1 over words as in SQuAD and CoQA, numbers as in GSM8K."""

import re
import string
from collections import Counter
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """Split a text into words as SQuAD does: lower case, without punctuation and articles."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def exact_match(right: str, said: str) -> bool:
    """Return True if both texts have the same words."""
    return words(right) == words(said)


def f1(right: str, said: str) -> float:
    """Compute the harmonic mean of precision and recall over words; an empty text matches only an empty text."""
    wanted, given = words(right), words(said)
    if not wanted or not given:
        return float(wanted == given)
    shared = (Counter(wanted) & Counter(given)).total()
    return 2 * shared / (len(wanted) + len(given))


def f1_of_conversation(answers: Sequence[str], said: str) -> float:
    """Compute CoQA's F1: the best over all people's answers except one, averaged over the one left out.

    If answers differ only in case, the first one counts; the first person's answer always counts.
    """
    different = list(answers[:1])
    for answer in answers[1:]:
        if answer.lower() not in [one.lower() for one in different]:
            different.append(answer)
    found = [f1(answer, said) for answer in different]
    if len(found) == 1:
        return found[0]
    return sum(max(found[:left] + found[left + 1 :]) for left in range(len(found))) / len(found)


def last_number(text: str) -> str | None:
    """Return the last number of a text in plain digits; None if there is none."""
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return digits(found[-1]) if found else None


def number_after(phrase: str, text: str) -> str | None:
    """Return the first number that directly follows a phrase, ignoring case; None if there is none."""
    found = re.search(rf"{re.escape(phrase)} (-?[$0-9.,]+)", text, re.IGNORECASE)
    return digits(found[1]) if found else None


def digits(number: str) -> str:
    """Remove commas, dollar signs and a final full stop."""
    return number.replace(",", "").replace("$", "").removesuffix(".")
