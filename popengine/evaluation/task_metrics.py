"""What a generated answer is worth: exact match and F1 over words as SQuAD and CoQA have them, numbers as GSM8K has."""

import re
import string
from collections import Counter
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """What SQuAD compares: lower case, without punctuation and articles."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def exact_match(right: str, said: str) -> bool:
    return words(right) == words(said)


def f1(right: str, said: str) -> float:
    """Harmonic mean of precision and recall over words; an empty side matches nothing but an empty one."""
    wanted, given = words(right), words(said)
    if not wanted or not given:
        return float(wanted == given)
    shared = (Counter(wanted) & Counter(given)).total()
    return 2 * shared / (len(wanted) + len(given))


def f1_of_conversation(answers: Sequence[str], said: str) -> float:
    """CoQA's: the best F1 over all people's answers but one, on average over who is left out.

    Of answers that differ in their case alone the first counts, the first person's own always.
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
    """As digits, without what people write around them; None where there is none."""
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return digits(found[-1]) if found else None


def number_after(phrase: str, text: str) -> str | None:
    """The first number that directly follows a phrase, in whatever case."""
    found = re.search(rf"{re.escape(phrase)} (-?[$0-9.,]+)", text, re.IGNORECASE)
    return digits(found[1]) if found else None


def digits(number: str) -> str:
    return number.replace(",", "").replace("$", "").removesuffix(".")
