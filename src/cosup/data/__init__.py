"""Records, their JSON Lines, the formats of others, and how questions become examples."""

from cosup.data.records import (
    Evidence,
    Example,
    Passage,
    Problem,
    QAPair,
    Question,
    Text,
    kind_of,
    read_examples,
    read_passages,
    read_questions,
    read_records,
    write_records,
)

__all__ = [
    "Evidence",
    "Example",
    "Passage",
    "Problem",
    "QAPair",
    "Question",
    "Text",
    "kind_of",
    "read_examples",
    "read_passages",
    "read_questions",
    "read_records",
    "write_records",
]
