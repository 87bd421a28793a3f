"""The engine: answers for lists of prompts, streams of events, sessions for servers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from cosup.config import UserError
from cosup.engine.events import Event, Finished
from cosup.engine.options import Options
from cosup.engine.reader import Gen
from cosup.engine.session import Session
from cosup.index import HybridIndex, Index
from cosup.model import CoSupModel
from cosup.template import Response


class Engine:
    """Answers prompts with a model and an index.

    Args:
        model: in evaluation mode; an engine made before its weights change may go on with those that it had.
        index: built by this model.
        options: see `Options`; those that the model comes with where it says None.

    Raises:
        UserError: the index was built by another model.
    """

    def __init__(self, model: CoSupModel, index: Index, options: Options | None = None):
        check_index(model, index)
        self.model, self.index = model, HybridIndex.of(index)
        self.options = (options or Options()).settled(model.settings.answers)
        self._gen = Gen.of(model)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        options: Options | Sequence[Options] | None = None,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> list[Response]:
        """Responses to prompts, in order.

        Args:
            prompts: questions, or ids from `Template.prompt` or `Template.chat`.
            options: of all, or of each; those of the engine without.
            on_progress: is told how many responses are finished.

        Raises:
            UserError: a prompt is empty, or longer than the context.
        """
        each = [options] * len(prompts) if options is None or isinstance(options, Options) else list(options)
        if len(each) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts and {len(each)} options; give one for each prompt")
        session = self._session(min(self.options.rows, max(len(prompts), 1)))
        numbers = [_submitted(session, prompts, i, own) for i, own in enumerate(each)]
        responses: dict[int, Response] = {}
        while len(responses) < len(prompts):
            for number, event in session.step():
                if isinstance(event, Finished):
                    responses[number] = event.response
                    on_progress(len(responses))
        return [responses[number] for number in numbers]

    def stream(self, prompt: str | Sequence[int], *, options: Options | None = None) -> Iterator[Event]:
        """The events of one response as they happen; closing the iterator ends it. See `generate`."""
        session = self._session(1)
        return _events(session, session.submit(prompt, options=options or self.options))

    def session(self) -> Session:
        """Rows that requests join and leave while others go on, as a server needs them."""
        return self._session(self.options.rows)

    def _session(self, rows: int) -> Session:
        return Session(self.model, self.index, replace(self.options, rows=rows), gen=self._gen)


def _submitted(session: Session, prompts: Sequence[str | Sequence[int]], i: int, options: Options | None) -> int:
    try:
        return session.submit(prompts[i], options=options)
    except UserError as e:
        raise e if len(prompts) == 1 else UserError(f"prompt {i + 1:,} of {len(prompts):,}: {e}") from None


def _events(session: Session, request: int) -> Iterator[Event]:
    try:
        while session.active or session.waiting:
            for _, event in session.step():
                yield event
    finally:
        session.cancel(request)


def check_index(model: CoSupModel, index: Index) -> None:
    """Raises UserError if the index was built by another model."""
    if index.fingerprint != model.fingerprint:
        raise UserError(
            f"the index was built by another model (fingerprint {index.fingerprint[:12] or 'none'}, this one's is "
            f"{model.fingerprint[:12] or 'none'}); build it again with `cosup index build --model` and this model"
        )


def check_query(model: CoSupModel, prompt: Sequence[int]) -> None:
    """Raises UserError if the model can't read a prompt that is searched by."""
    if len(prompt) >= model.context:
        raise UserError(f"the query has {len(prompt):,} tokens, and the model reads at most {model.context:,}")
