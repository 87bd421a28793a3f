"""Between records and token ids: control tokens, Example -> Rendered, ids -> Response.

Text is tokenised segment by segment, the same way in training and in the engine, and what users and documents write
never becomes a control token: only this module puts their ids into a sequence.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cosup.config import UserError
from cosup.data import Example, Passage, Text
from cosup.data.convert import DEFAULT_RULE, TASKS
from cosup.data.documents import sentences

IGNORED = -100
"""Label of a token that carries no loss."""

_ROLES = ("system", "user", "assistant")

Tokenizer = Any  # a fast tokenizer of transformers, which has no useful type


class TemplateSettings(BaseModel):
    """How text is laid out; saved in `cosup.json`, so that a model is always asked as it was trained.

    Args:
        ret, cs, ce: the control tokens that open a retrieval, open a claim and close it.
        end_token: appended to what Emb_seq reads; None: the end-of-sequence token of its tokenizer; "": nothing.
        prompt: with `{instruction}` and `{question}`.
        passage: with `{title}` and `{text}`, for passages that have a title; others are read as their text alone.
        instructions: by task.
        default_instruction: of every other task.
        turn: with `{role}` and `{content}`, how an earlier message of a chat stands before the last question.
        max_passage_tokens: longest passage, embedded or inserted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ret: str = "[Ret]"
    cs: str = "[Cs]"
    ce: str = "[Ce]"
    end_token: str | None = None
    prompt: str = "{instruction}## Input:\n\n{question}## Output:\n\n"
    passage: str = "{title} :: {text}"
    instructions: dict[str, str] = {task: rule.instruction for task, rule in TASKS.items()}
    default_instruction: str = DEFAULT_RULE.instruction
    turn: str = "{role}: {content}\n\n"
    max_passage_tokens: int = 256


@dataclass(frozen=True, slots=True)
class Rendered:
    """A training sequence of T tokens with K retrievals.

    Args:
        ids: T token ids, prompt and response.
        labels: T ids; `IGNORED` where there is no loss. Not shifted: labels[t] is predicted from ids[:t].
        inserted: T flags; whether the system put the token there in the place of Gen.
        prompt_length: how many of the tokens are the prompt.
        ret: K positions of `[Ret]`.
        gold: K ids of the passages to retrieve.
        ignored: K sets of ids that are neither label nor negative.
        negatives: K lists of ids of hard negatives.
    """

    ids: list[int]
    labels: list[int]
    inserted: list[bool]
    prompt_length: int
    ret: list[int]
    gold: list[str]
    ignored: list[frozenset[str]]
    negatives: list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of a response and the passage that it cites.

    Args:
        text: the claim.
        start, end: its character span in `Response.text`.
        passage: id of the cited passage; empty where only token ids are known.
        score: similarity of the retrieval state and the passage.
    """

    text: str
    start: int
    end: int
    passage: str = ""
    score: float = 0.0


Reason = Literal["stop", "length", "error", "unknown"]


@dataclass(frozen=True, slots=True)
class Response:
    """What Gen wrote.

    Args:
        text: all of it, claims included, passages not.
        claims: in order, one for each retrieval.
        well_formed: whether every claim was closed and the sequence ended by itself, without a stray control token.
        reason: why it ended: `stop`, the end of sequence or a stop string; `length`, a limit; `error`.
        error: where the reason is `error`, what went wrong; before the first colon nothing that only its owner may see.
        nothing_found: whether a retrieval was taken back because no passage was good enough or left.
        retrieved: ids of the best passages of each retrieval, best first; one that found nothing included.
        scores: of these passages.
        shortened: ids of the passages of which only the beginning was put into Gen's context, since all did not fit.
        tokens_read: tokens that Gen's context took in, prompt and passages included, those read again counted again.
        tokens_sampled: tokens that Gen chose itself.
        seconds: from when a row was free for it to its end.
    """

    text: str
    claims: tuple[Claim, ...] = ()
    well_formed: bool = True
    reason: Reason = "unknown"
    error: str = ""
    nothing_found: bool = False
    retrieved: tuple[tuple[str, ...], ...] = ()
    scores: tuple[tuple[float, ...], ...] = ()
    shortened: tuple[str, ...] = ()
    tokens_read: int = 0
    tokens_sampled: int = 0
    seconds: float = 0.0


def separator(before: str, piece: str) -> str:
    """The blank that is shown between two parts of a response where neither brings one."""
    if not before or not piece or before[-1].isspace() or piece[0].isspace() or piece[0] in string.punctuation:
        return ""
    return " "


class Template:
    """Turns questions, passages and examples into token ids, and token ids into responses.

    Args:
        tokenizer: Gen's; it knows the control tokens (see `with_control_tokens`).
        emb_tokenizer: Emb_seq's; without it, Gen's.
        settings: the layout.

    Attributes:
        shortened: ids of the passages that did not fit their limit so far, for the log.
    """

    def __init__(
        self, tokenizer: Tokenizer, emb_tokenizer: Tokenizer | None = None, *, settings: TemplateSettings | None = None
    ):
        self.settings = settings or TemplateSettings()
        self.tokenizer, self.emb_tokenizer = tokenizer, emb_tokenizer or tokenizer
        names = (self.settings.ret, self.settings.cs, self.settings.ce)
        self.ret, self.cs, self.ce = (_control_id(tokenizer, name) for name in names)
        if tokenizer.eos_token_id is None:
            raise UserError("Gen's tokenizer has no end-of-sequence token, without which a response can't end; set one")
        self.eos: int = tokenizer.eos_token_id
        self.shortened: set[str] = set()
        self._bos = _surroundings(tokenizer)[0]
        self._emb_before, self._emb_after = self._emb_surroundings()

    @property
    def frames(self) -> list[list[int]]:
        """What stands around texts: Gen's beginning and end, and what comes before and after Emb_seq's passages."""
        return [self._bos, [self.eos], self._emb_before, self._emb_after]

    def encode(self, text: str) -> list[int]:
        """Ids of a segment of text for Gen; never a control token, whatever it holds."""
        return _encode(self.tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a segment of ids."""
        text: str = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

    def spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Of each text its `encode`, and which characters each id stands for; of the tokenizers that can tell."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        return list(zip(encoded.input_ids, encoded.offset_mapping, strict=True))

    def prompt(self, question: str, *, task: str) -> list[int]:
        """Ids of instruction and question, with the beginning-of-sequence token where the tokenizer has one."""
        return self._laid_out(self._instruction(task), question)

    def chat(self, messages: Sequence[Mapping[str, str]], *, task: str = "") -> list[int]:
        """Ids of a chat as one prompt.

        The contents of the system messages, a line each, take the place of the instruction. Earlier messages stand
        before the last question, each laid out by `TemplateSettings.turn`. A chat of one question is that question's
        `prompt`.

        Args:
            messages: each with a `role` (`system`, `user` or `assistant`) and a `content`; the last is a user's.
            task: whose instruction stands there where no message is the system's.

        Raises:
            UserError: there is no message, one is of another form, or the last is not a user's.
        """
        for message in messages:
            if message.get("role") not in _ROLES or not isinstance(message.get("content"), str):
                roles = ", ".join(_ROLES)
                raise UserError(f"a chat message needs a role, one of {roles}, and a content of text, not {message!r}")
        if not messages or messages[-1]["role"] != "user":
            raise UserError("a chat ends with a question: its last message must have the role user")
        system = [message["content"] for message in messages if message["role"] == "system"]
        earlier = [message for message in messages[:-1] if message["role"] != "system"]
        turns = "".join(_fill(self.settings.turn, role=m["role"], content=m["content"]) for m in earlier)
        instruction = "\n".join(system) if system else self._instruction(task)
        return self._laid_out(instruction, turns + messages[-1]["content"])

    def asked(self, prompt: Sequence[int]) -> str:
        """The question of a `prompt`, or the turns of a `chat`, in words: without instruction and layout.

        Where nothing of the layout stands between instruction and question, the instruction is kept.
        """
        before, _, after = self.settings.prompt.partition("{question}")
        between = before.rpartition("{instruction}")[2]
        text = self.decode(prompt[len(self._bos) :]).removesuffix(after)
        return (text.partition(between)[2] if between else "") or text

    def inserted(self, passage: Passage, *, max_tokens: int) -> list[int]:
        """What is put into Gen's context: the passage, shortened at a sentence to fit, and `[Cs]`.

        Args:
            passage: the passage.
            max_tokens: most ids to return, `[Cs]` included; at least 2.
        """
        return [*self._fit(passage, self.encode, max_tokens - 1), self.cs]

    def fits(self, passage: Passage, *, max_tokens: int) -> bool:
        """Whether `inserted` keeps all of a passage."""
        return len(self.encode(self.passage_text(passage))) < max_tokens

    def embedded(self, passage: Passage, *, max_tokens: int) -> list[int]:
        """What Emb_seq reads: the passage, shortened at a sentence to fit, and the end token.

        Args:
            passage: the passage.
            max_tokens: most ids to return, the end token included.
        """
        room = max_tokens - len(self._emb_before) - len(self._emb_after)
        middle = self._fit(passage, lambda text: _encode(self.emb_tokenizer, text), room)
        return [*self._emb_before, *middle, *self._emb_after]

    def passage_text(self, passage: Passage) -> str:
        """Title and text as they are read."""
        if not passage.title:
            return passage.text
        return _fill(self.settings.passage, title=passage.title, text=passage.text)

    def render(self, example: Example, passages: Mapping[str, Passage], *, train_on_passages: bool = False) -> Rendered:
        """The training sequence of an example: the one place that says which tokens Gen must produce itself.

        Args:
            example: the example.
            passages: by id, those that it cites.
            train_on_passages: whether inserted tokens carry loss too.

        Raises:
            UserError: it cites a passage that is not in `passages`.
        """
        ids = self.prompt(example.question, task=example.task)
        builder = _Builder(ids, [IGNORED] * len(ids), [False] * len(ids), [], train_on_passages)
        prompt_length = len(ids)
        for part in example.response:
            if isinstance(part, Text):
                builder.write(self.encode(part.text))
                continue
            builder.ret.append(len(builder.ids))
            builder.write([self.ret])
            cited = _cited(passages, part.passage, example.id)
            builder.insert(self.inserted(cited, max_tokens=self.settings.max_passage_tokens))
            builder.write([*self.encode(part.claim), self.ce])
        builder.write([self.eos])
        golds = frozenset(part.passage for part in example.evidence)
        return Rendered(
            ids=builder.ids,
            labels=builder.labels,
            inserted=builder.inserted,
            prompt_length=prompt_length,
            ret=builder.ret,
            gold=[part.passage for part in example.evidence],
            ignored=[(golds | frozenset(part.also)) - {part.passage} for part in example.evidence],
            negatives=[part.negatives for part in example.evidence],
        )

    def parse(self, ids: Sequence[int], inserted: Sequence[bool]) -> Response:
        """The response that token ids stand for; the inverse of `render`, prompt left out.

        Args:
            ids: T ids of a response.
            inserted: T flags; whether the system put the token there.
        """
        parser = Parser(self)
        for token, is_inserted in zip(ids, inserted, strict=True):
            parser.read(token, inserted=is_inserted)
        return parser.finish()

    def _instruction(self, task: str) -> str:
        return self.settings.instructions.get(task, self.settings.default_instruction)

    def _laid_out(self, instruction: str, question: str) -> list[int]:
        return self._bos + self.encode(_fill(self.settings.prompt, instruction=instruction, question=question))

    def _fit(self, passage: Passage, encode: Callable[[str], list[int]], room: int) -> list[int]:
        ids = encode(self.passage_text(passage))
        if len(ids) <= room:
            return ids
        self.shortened.add(passage.id)
        return _shorten(passage, room, lambda shorter: encode(self.passage_text(shorter)))

    def _emb_surroundings(self) -> tuple[list[int], list[int]]:
        before, after = _surroundings(self.emb_tokenizer)
        end = self.settings.end_token
        if end is None and self.emb_tokenizer.eos_token_id is not None:
            after = [self.emb_tokenizer.eos_token_id]
        elif end is not None:
            after = [_control_id(self.emb_tokenizer, end)] if end else []
        return before, after


@dataclass(slots=True)
class _Builder:
    ids: list[int]
    labels: list[int]
    inserted: list[bool]
    ret: list[int]
    train_on_passages: bool

    def write(self, ids: list[int]) -> None:
        self._extend(ids, ids, inserted=False)

    def insert(self, ids: list[int]) -> None:
        self._extend(ids, ids if self.train_on_passages else [IGNORED] * len(ids), inserted=True)

    def _extend(self, ids: list[int], labels: list[int], *, inserted: bool) -> None:
        self.ids += ids
        self.labels += labels
        self.inserted += [inserted] * len(ids)


class Parser:
    """Reads a response token by token: text, then `[Ret] <inserted> [Cs] claim [Ce]`, then text again.

    Args:
        template: knows the tokens.

    Attributes:
        state: what the next token belongs to.
        claims: those that are closed.
    """

    def __init__(self, template: Template):
        self.state: Literal["text", "passage", "claim", "ended"] = "text"
        self.claims: list[Claim] = []
        self._template = template
        self._segment: list[int] = []
        self._closed = ""
        self._sound = True

    @property
    def text(self) -> str:
        """Everything readable so far, the open segment included."""
        piece = self._template.decode(self._segment)
        return self._closed + separator(self._closed, piece) + piece

    def read(self, token: int, *, inserted: bool) -> None:
        """Takes the next token; one that can't stand here is dropped, and the response is not well formed."""
        t = self._template
        if inserted and self.state == "passage":
            if token == t.cs:
                self.state = "claim"
        elif token == t.ret and self.state == "text":
            self._close("passage")
        elif token == t.ce and self.state == "claim":
            self._close_claim()
        elif token == t.eos and self.state == "text":
            self._close("ended")
        elif inserted or self.state not in ("text", "claim") or token in (t.ret, t.cs, t.ce, t.eos):
            self._sound = False
        else:
            self._segment.append(token)

    def finish(self) -> Response:
        """The response; a claim that is still open ends here."""
        ended = self.state == "ended"
        if self.state == "claim":
            self._close_claim()
        self._close("ended")
        return Response(self._closed, tuple(self.claims), well_formed=self._sound and ended)

    def _close(self, following: Literal["text", "passage", "ended"]) -> None:
        self._closed = self.text
        self._segment = []
        self.state = following

    def _close_claim(self) -> None:
        length = len(self._template.decode(self._segment))
        self._close("text")
        end = len(self._closed)
        self.claims.append(Claim(self._closed[end - length :], end - length, end))


def with_control_tokens(tokenizer: Tokenizer, settings: TemplateSettings) -> int:
    """Adds the control tokens that a tokenizer does not have yet, as special tokens.

    Returns:
        How many were added.
    """
    added: int = tokenizer.add_tokens([settings.ret, settings.cs, settings.ce], special_tokens=True)
    return added


def _control_id(tokenizer: Tokenizer, name: str) -> int:
    token = tokenizer.get_added_vocab().get(name)
    if token is None:
        raise UserError(f"the tokenizer has no special token {name!r}; add it, or name another in cosup.json")
    return int(token)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    except TypeError:  # of a lone surrogate, which is what Python makes of stray bytes on a command line
        raise UserError(f"{text[:80]!r} holds bytes that are no text; write it in UTF-8") from None
    return ids


def _surroundings(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a text."""
    bare = _encode(tokenizer, "a")
    full: list[int] = tokenizer("a").input_ids
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


def _fill(template: str, **values: str) -> str:
    """`template` with each `{name}` replaced once; braces inside the values mean nothing."""
    pieces = string.Formatter().parse(template)
    return "".join(literal + (values[name] if name is not None else "") for literal, name, _, _ in pieces)


def _shorten(passage: Passage, room: int, encode: Callable[[Passage], list[int]]) -> list[int]:
    """The ids of as many whole sentences as fit; of as many tokens, where not even one does."""
    kept, fitting = "", None
    for sentence in sentences(passage.text):
        kept += sentence
        ids = encode(replace(passage, text=kept.rstrip()))
        if len(ids) > room:
            return fitting if fitting is not None else ids[: max(room, 0)]
        fitting = ids
    return fitting or []


def _cited(passages: Mapping[str, Passage], passage: str, example: str) -> Passage:
    if passage not in passages:
        raise UserError(
            f"example {example!r} cites passage {passage!r}, which is in none of the passages files; "
            "name the file that holds it under data.passages"
        )
    return passages[passage]
