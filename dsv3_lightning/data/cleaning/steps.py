"""The steps of cleaning for a batch of documents: repair, language, lines, quality, masks, evaluation sets.

A document is a text, or a conversation, which is kept or dropped as a whole: its messages are repaired and masked, and
it is not judged by the rules of quality, which are made for running text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dsv3_lightning.data.cleaning.c4 import without_lines
from dsv3_lightning.data.cleaning.config import CleaningConfig, Rules
from dsv3_lightning.data.cleaning.contamination import Contamination
from dsv3_lightning.data.cleaning.language import identify
from dsv3_lightning.data.cleaning.private import mask
from dsv3_lightning.data.cleaning.quality import judge
from dsv3_lightning.data.cleaning.repair import repair
from dsv3_lightning.data.cleaning.words import words_of
from dsv3_lightning.data.config import SourceConfig
from dsv3_lightning.data.text.conversation import Message

CODE = "code"  # as a source's language: never repaired, nor given to the model of languages
STEPS = ("repair", "language", "lines", "quality", "pii", "contaminated", "exact", "near")

Found = str | list[Message]


@dataclass
class Document:
    """A document on its way. reason: why it is dropped, as `step` or `step: what`; None: it is kept.

    changed: the steps that changed its text. language: identified, or its source's.
    """

    found: Found
    language: str | None = None
    reason: str | None = None
    changed: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text, or those of all messages."""
        return self.found if isinstance(self.found, str) else "\n".join(message.text for message in self.found)

    def map(self, step: str, texts: Sequence[str]) -> None:
        """Puts new texts in place of those of the messages, or of the one text."""
        if isinstance(self.found, str):
            new: Found = texts[0]
        else:
            new = [message._replace(text=text) for message, text in zip(self.found, texts)]
        if new != self.found:
            self.found, self.changed = new, [*self.changed, step]

    @property
    def texts(self) -> list[str]:
        return [self.found] if isinstance(self.found, str) else [message.text for message in self.found]


def clean_batch(
    found: Sequence[Found], source: SourceConfig, cleaning: CleaningConfig, contamination: Contamination | None
) -> list[Document]:
    """The documents after all steps that need no other document. Raises ConfigError for a library that is missing."""
    documents = [Document(one, source.language) for one in found]
    code = source.language == CODE
    if cleaning.repair and not code:
        for document in documents:
            document.map("repair", [repair(text) for text in document.texts])
    if cleaning.languages is not None and not code:
        for document in documents:
            choose_language(document, source.language, cleaning.languages.threshold)
    for rules, chosen in by_rules(documents, source, cleaning).values():
        apply_rules(chosen, rules)
    for document in kept(documents):
        if cleaning.pii:
            document.map("pii", [mask(text)[0] for text in document.texts])
        if not document.text.strip():
            document.reason = "lines: all"
    if contamination is not None and (chosen := kept(documents)):
        for document, hit in zip(chosen, contamination.found(words_of([document.text for document in chosen]))):
            document.reason = "contaminated" if hit else None
    return documents


def kept(documents: Sequence[Document]) -> list[Document]:
    return [document for document in documents if document.reason is None]


def choose_language(document: Document, wanted: str | None, threshold: float) -> None:
    """Records the document's language, and drops the document if its source has another one."""
    code, probability = identify(document.text, threshold)
    if wanted is None:
        document.language = code if probability >= threshold else None
    elif code != wanted or probability < threshold:
        document.reason = f"language: {code if code != wanted else 'unsure'}"


def by_rules(
    documents: Sequence[Document], source: SourceConfig, cleaning: CleaningConfig
) -> dict[str, tuple[Rules, list[Document]]]:
    """The texts that are judged, by the name of the set of rules that holds for their language."""
    groups: dict[str, tuple[Rules, list[Document]]] = {}
    if source.filters is None:
        return groups
    for document in kept(documents):
        if not isinstance(document.found, str):
            continue
        if isinstance(source.filters, str):
            own = f"{source.filters}_{document.language}"
            name = own if own in cleaning.quality else source.filters
            rules = cleaning.quality[name]
        else:
            name, rules = "", source.filters
        groups.setdefault(name, (rules, []))[1].append(document)
    return groups


def apply_rules(documents: Sequence[Document], rules: Rules) -> None:
    """Removes lines, then drops the documents that break a rule."""
    limits = [rules.get(name) for name in ("min_words_per_line", "max_word_chars_per_line")]
    boilerplate = bool(rules.get("drop_boilerplate_lines"))
    if boilerplate or limits != [None, None]:
        for document in documents:
            document.map("lines", [without_lines(document.text, limits[0], limits[1], boilerplate)])
    for document, rule in zip(documents, judge([document.text for document in documents], rules)):
        document.reason = f"quality: {rule}" if rule else None
