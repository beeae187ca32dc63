"""What a chat judge's answer states: a verdict, a rating, by how much.

All three are read strictly: the last line that states one counts, and whatever could be read in two
ways is unparseable, never a guess. Only English wording is understood.
"""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from selfsteer.data.records import Verdict
from selfsteer.engines.base import PROMPT_TOO_LONG, REQUEST_FAILED
from selfsteer.models.reasoning import unanswered

_NOUN = r"(?:response|answer|assistant|option|candidate|model|reply)"
#: "The answer is B" may be about the question itself, so an answer counts as a label only where
#: it is called final, better or mine, or where it begins a line.
_LABEL = (
    r"(?<![A-Za-z])(?:verdict|winner|judge?ment|preference"
    r"|(?:final|better|best|winning|preferred|my)(?: \w+)?"
    r" (?:answer|response|choice|decision|pick|one)"
    r"|(?:^|(?<=[.!?{] )|(?<=\{))(?:the )?(?:answer|choice|decision|conclusion|result|overall|pick)"
    r"(?=\s*[:=→-]))"
)
_IS = r"(?:\s*[:=→]\s*|\s+[-–—]\s+|\s+(?:is|goes to)\s*:?\s+)"
_TIE = r"(?:(?:a )?(?:tie|draw)|tied|equal|equally good)"
#: What may follow a letter, so that the article in "a good answer" is no verdict.
_END = r"(?=\s*(?:$|[.,;:!)}\]/&|]|[-–—]\s|(?:because|since|as|over|by|due|for|and|or|overall)\b))"
_LABELLED = re.compile(
    rf"{_LABEL}{_IS}(?:(?P<tie>{_TIE})\b|(?:the )?(?:{_NOUN} )?(?P<letter>[ab]){_END})", re.I
)
_BRACKETED = re.compile(
    rf"(?:\[\[\s*|\\boxed\{{\s*(?:\\text\{{)?)"
    rf"(?:(?P<tie>{_TIE}|c)|(?:{_NOUN} )?(?P<letter>[ab]))\s*(?:\]\]|\}})",
    re.I,
)
_BARE = re.compile(rf"\W*(?:(?P<tie>{_TIE})|(?P<letter>[ab]))[^\w:]*", re.I)
_BARE_NOUN = re.compile(rf"\W*{_NOUN} (?P<letter>[ab])[^\w:]*", re.I)
#: After a labelled verdict: another one beside it; second thoughts, and what they are about.
_RIVAL = re.compile(rf"\s*(?:[,/&|]|and\b|or\b|vs\b\.?)\s*(?:{_NOUN} )?(?:[AB]|tie)\b")
_RETHOUGHT = re.compile(
    r"\b(?:[Nn]o|[Ww]ait|[Aa]ctually|[Ss]orry|[Cc]orrection|[Mm]aybe|[Pp]erhaps)\b"
)
_NAMED = re.compile(r"\b(?:[AB]|tie)\b")
#: Before a labelled verdict: it is about something else, or in its sentence only supposed.
_NOT_ITS_OWN = re.compile(
    r"(?:\b(?:worse|worst|wrong|weaker|losing|rejected|inferior|correct|not|its|their|whose)\s+|'s\s+)"
    r"(?:\w+\s+)?$",
    re.I,
)
_SUPPOSED, _ENDS = re.compile(r"\b(?:if|unless|whether)\b", re.I), re.compile("[.!?]")
_BETTER = r"(?:better|best|superior|stronger|preferable)"
_WINS = re.compile(
    rf"(?:\b{_NOUN} (?P<named>[ab])|(?<!\w)(?P<capital>(?-i:[AB])))\s+"
    rf"(?:wins\b|(?:is|was|seems|looks|appears|\w+ be) (?:\w+ )?(?:the )?(?:{_BETTER})\b"
    r"(?P<partly> (?:at|in|on|for|when|if)\b)?)"
    rf"|\b(?:I|we) (?:prefer|choose|pick) (?:the )?(?:{_NOUN} )?(?P<chosen>(?-i:[AB]))\b",
    re.I,
)
_EVEN = re.compile(
    r"\b(?:both|they|the (?:two )?(?:responses|answers))(?: (?:responses|answers))? are "
    r"(?:\w+ )?(?:equal|equally|tied|identical|the same)\b|\bit(?:'s| is) a (?:tie|draw)\b",
    re.I,
)
_DENIED = re.compile(r"\b(?:not|never|neither|nor|hardly|cannot|without)\b|n't\b", re.I)
_DOUBTED = re.compile(
    r"\b(?:might|may|could|would|seems|looks|appears|if|unless|whether|perhaps|maybe)\b", re.I
)
_MARKUP = re.compile(r"[*_`\"“”„«»#]|(?<!\w)'|'(?!\w)")


_RATING = re.compile(
    r"(?:\brating\s*[:=]\s*|\[\[\s*)(-?\d+(?:[.,]\d+)?)(?:\s*(?:/|out of)\s*(\d+))?", re.I
)
#: After a number: another one beside it.
_RANGE = re.compile(r"\s*(?:[-–—,&]|(?:or|to|and)\b)\s*\d", re.I)
_MARGIN = re.compile(r"margin\s*[:=]\s*(small|large)\W*", re.I)


#: Characters of an answer in which a verdict is looked for; a server can send more.
LONGEST = 100_000


def lost(answer: Mapping[str, Any]) -> str:
    """Why a stored answer states nothing: it was cut off or never came; empty if it ended."""
    ended, thoughts = str(answer["finish_reason"]), answer.get("reasoning", "")
    if without := unanswered(answer["text"], thoughts, ended):
        return without
    if ended == "stop":
        return ""
    return ended if ended.startswith((PROMPT_TOO_LONG, REQUEST_FAILED)) else "cut_off"


def read_verdict(answer: Mapping[str, Any]) -> tuple[Verdict, str]:
    """`extract_verdict` of a stored answer that ended by itself."""
    reason = lost(answer)
    return (Verdict.UNPARSEABLE, reason) if reason else extract_verdict(answer["text"])


def extract_verdict(text: str) -> tuple[Verdict, str]:
    r"""The verdict that a judge's answer states: FIRST for A, SECOND for B.

    Formal statements are ``[[A]]``, ``\boxed{A}``, a label (``Verdict: A``, ``my choice is B``)
    and a line that is nothing but a verdict; the last line that makes one decides, unless it
    makes two, or a sentence after it says something else. Without any, sentences such as
    "Response A is better" or "both are equally good" decide if all of them agree.

    Returns:
        The verdict, and for UNPARSEABLE the reason: ``no_verdict``, ``ambiguous`` or ``too_long``.

    >>> extract_verdict("A is wordy.\n**Verdict:** B")[0].value
    'second'
    >>> extract_verdict("Verdict: A or B")
    (<Verdict.UNPARSEABLE: 'unparseable'>, 'ambiguous')
    """
    if len(text.rpartition("</think>")[2]) > LONGEST:
        return Verdict.UNPARSEABLE, "too_long"
    lines = _plain_lines(text)
    formal = [_formal(line, last=i == len(lines) - 1) for i, line in enumerate(lines)]
    # bare lines that disagree are headings: only one at the very end still counts
    bare = [i for i, line in enumerate(lines) if _BARE.fullmatch(line)]
    if len(set().union(*(formal[i] for i in bare))) > 1:
        formal = [set() if i in bare and i < len(lines) - 1 else f for i, f in enumerate(formal)]
    last = max((i for i, stated in enumerate(formal) if stated), default=-1)
    found = set(formal[last]) if last >= 0 else set()
    found = found.union(*map(_sentences, lines[last + 1 :]))
    if len(found) == 1 and Verdict.UNPARSEABLE not in found:
        return found.pop(), ""
    return Verdict.UNPARSEABLE, "ambiguous" if found else "no_verdict"


def extract_rating(text: str) -> tuple[float | None, str]:
    r"""The rating in the last line that states one.

    Returns:
        1 to 10, or None and the reason: ``no_rating``, ``ambiguous`` or ``out_of_range``.

    >>> extract_rating("Clear and right.\n**Rating:** 8")
    (8.0, '')
    >>> extract_rating("Rating: 8 or Rating: 9")
    (None, 'ambiguous')
    """
    stated = [found for line in _plain_lines(text) if (found := list(_RATING.finditer(line)))]
    if not stated:
        return None, "no_rating"
    ratings = {float(m[1].replace(",", ".")) for m in stated[-1]}
    if len(ratings) > 1 or any(_RANGE.match(m.string, m.end()) for m in stated[-1]):
        return None, "ambiguous"
    (rating,) = ratings
    scales = {m[2] for m in stated[-1]} - {None}
    return (rating, "") if 1 <= rating <= 10 and scales <= {"10"} else (None, "out_of_range")


def extract_margin(text: str) -> str | None:
    """``small`` or ``large``, from the last line that states a margin; None without one."""
    found = [m for line in _plain_lines(text) if (m := _MARGIN.fullmatch(line))]
    return found[-1][1].lower() if found else None


def _plain_lines(text: str) -> list[str]:
    """The lines of a judge's answer without thoughts and markup; none of unended thoughts."""
    answer = text.rpartition("</think>")[2]
    if "<think>" in answer:
        return []
    plain = _MARKUP.sub("", unicodedata.normalize("NFKC", answer).replace("’", "'"))
    return [line.strip() for line in plain.splitlines() if line.strip()]


def _verdict(match: re.Match[str], *letters: str) -> Verdict:
    letter = next((match[name] for name in letters if match[name]), None)
    if letter is None:
        return Verdict.TIE
    return Verdict.FIRST if letter in "aA" else Verdict.SECOND


def _formal(line: str, *, last: bool) -> set[Verdict]:
    """Verdicts that a line states formally; with UNPARSEABLE among them where it takes one back."""
    found = {_verdict(m, "letter") for m in _BRACKETED.finditer(line)}
    labelled = list(_LABELLED.finditer(line))
    supposed = [m.start() for m in _SUPPOSED.finditer(line)]
    for m in labelled:
        found.add(_verdict(m, "letter"))
        before = line[max(0, m.start() - 100) : m.start()]
        place = bisect_left(supposed, m.start())
        if (
            _RIVAL.match(line, m.end())
            or _NOT_ITS_OWN.search(before)
            or any(not _ENDS.search(line, i, m.start()) for i in supposed[place - 1 : place])
        ):
            found.add(Verdict.UNPARSEABLE)
        if len(found) > 1:
            break
    if labelled and (again := _RETHOUGHT.search(line, labelled[0].end())):
        found |= {Verdict.UNPARSEABLE} if _NAMED.search(line, again.end()) else set()
    bare = _BARE.fullmatch(line) or (_BARE_NOUN.fullmatch(line) if last else None)
    return found | {_verdict(bare, "letter")} if bare else found


def _sentences(line: str) -> set[Verdict]:
    """Verdicts that a line's sentences state; UNPARSEABLE where one is stated with doubt."""
    found = set[Verdict]()
    for sentence in re.split(r"(?<=[.!?;])\s+", line):
        if _DENIED.search(sentence):
            continue
        stated = list(_WINS.finditer(sentence))
        mine = {_verdict(m, "named", "capital", "chosen") for m in stated}
        mine |= {Verdict.TIE} if _EVEN.search(sentence) else set()
        if mine and (_DOUBTED.search(sentence) or any(m["partly"] for m in stated)):
            mine.add(Verdict.UNPARSEABLE)
        found |= mine
    return found
