"""Requests in, results out: many samples in flight, their requests in batches, every pass counted.

The rules. One batch size per program and bucket, always padded, so that a row's bits do not depend on its companions;
across batch sizes results agree to rounding. A batch leaves when it is full, or when nothing else can be done; inside
it the order is (sample, request), never that of completion, so a run is deterministic. Random keys come from the
sample's id and the request's number. What several requests need (an image's features, the keys and values of a prompt's
beginning) is computed once; whether it is shared changes neither results nor logical costs. Out of memory halves the
batch of that program, and says so. An error is thrown into the generator whose request it belongs to; if the generator
does not catch it, its answer says so, and nothing else stops.
"""

import math
import time
import warnings
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from PIL import Image

from jaxvqa import methods
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.gradients import GRADIENT
from jaxvqa.handlers import HANDLERS, IMAGES, LENGTHS, PREFIXES, Handler, Kept, State, Work
from jaxvqa.images import open_image
from jaxvqa.matcher import Matcher, matcher_of_method
from jaxvqa.matching import MATCH
from jaxvqa.requests import Answer, Asked, Continue, Cost, Gradient, Match, Passes, Reading, Reply, Request, Sample
from jaxvqa.sharding import RULES
from jaxvqa.vision.inputs import ImageInput
from jaxvqa.vlm import VLM

SERVED: dict[type[Request], Handler] = HANDLERS | {Gradient: GRADIENT, Match: MATCH}
"""By kind of request. To serve another kind, add its handler here."""
MATCHER = "matcher"
"""The model's name by which a method asks its matcher."""

AHEAD = 4  # samples in flight, in batches: enough to fill batches of several kinds
LOOK_AHEAD = 64  # samples begun after the oldest unfinished one, in batches: bounds the answers that wait their turn
DEPTH = 2  # batches on the device: the host prepares one while the device works on the other


@dataclass
class Stats:
    """Physical work of an engine so far: what really ran, padding included, shared work once."""

    batches: Counter = field(default_factory=Counter)
    """Batches by program."""
    rows: Counter = field(default_factory=Counter)
    """Rows by program that carried a request."""
    padding: Counter = field(default_factory=Counter)
    """Rows by program that carried none."""
    flops: int = 0


class Engine:
    """Runs methods on one model or several.

    models: a VLM; or VLMs and matching models by name. The first VLM is the default; a request that names no model goes
        to the first that can serve it.
    batch_size: rows per batch, of every program (on a mesh, rounded up to a multiple of its batch axes).
    lengths: token lengths to which prompts are padded, and at which prefixes end, ascending; each is compiled once.
    feature_bytes: device memory for image features kept for later requests.
    prefix_cache_bytes: device memory for keys and values of prompts' beginnings, kept for later requests or held by
        those in flight (0.3 GB per image of LLaVA-1.5-7B in 16 bits); what is in use is kept beyond it, but no more is
        computed while anything else can be done.
    in_flight_bytes: host memory for decoded images of samples in flight (at least one sample always is).
    cache_bytes: device memory for the caches that samples in flight keep (`keep=True`), beyond which none begins.
    exif: "ignore" (as LLaVA does) or "apply" the orientation of image files.
    seed: of sampled answers.

    Raises UserError for no VLM, a batch size below 1, and lengths that do not ascend.
    """

    def __init__(
        self,
        models: VLM | Mapping[str, VLM | Matcher],
        *,
        batch_size: int = 8,
        lengths: tuple[int, ...] = LENGTHS,
        feature_bytes: int = 1 << 30,
        prefix_cache_bytes: int = 2 << 30,
        in_flight_bytes: int = 2 << 30,
        cache_bytes: int = 8 << 30,
        exif: str = "ignore",
        seed: int = 0,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; expected at least 1")
        if not lengths or any(a >= b for a, b in pairwise((0, *lengths))):
            raise UserError(f"lengths are {lengths}; expected at least one, ascending")
        self.models = _by_name(models)
        if all(isinstance(model, Matcher) for model in self.models.values()):
            raise UserError(
                f"the engine was given no model that answers, but {', '.join(self.models) or 'none at all'}"
            )
        # A mesh splits the batch: every size is a multiple of the ways.
        self._ways = math.lcm(*(_ways(model) for model in self.models.values()))
        self.batch_size = -(-batch_size // self._ways) * self._ways
        self.lengths, self.exif, self.seed = lengths, exif, seed
        self.in_flight_bytes, self.cache_bytes = in_flight_bytes, cache_bytes
        self.shared = {IMAGES: _Shared(feature_bytes), PREFIXES: _Shared(prefix_cache_bytes)}
        self.prefixes: weakref.WeakSet[Kept] = weakref.WeakSet()  # all that are alive, shared or only held
        self.stats = Stats()
        self._sizes: dict[Hashable, int] = {}
        self._preprocessed: dict[Hashable, _Preprocessed] = {}

    @property
    def crowded(self) -> bool:
        """Whether prefixes take more memory than they should."""
        return sum(prefix.nbytes for prefix in self.prefixes) > self.shared[PREFIXES].capacity

    @property
    def default(self) -> VLM:
        """The first VLM."""
        return self.model(None)[1]

    def model(self, name: str | None) -> tuple[str, VLM]:
        """The VLM that a request names, and its name (None: the first). UserError for another name."""
        name, model = self._named(name, matches=False)
        if isinstance(model, Matcher):
            raise UserError(
                f"model {name!r} ({model.name}) matches images and texts, and answers nothing; it serves Match and "
                f"Gradient(of='match')"
            )
        return name, model

    def matcher(self, name: str | None) -> tuple[str, Matcher]:
        """The matching model that a request names, and its name (None: the first). UserError for another name."""
        name, model = self._named(name, matches=True)
        if not isinstance(model, Matcher):
            raise UserError(
                f"model {name!r} ({model.name}) answers, and matches nothing: Match and Gradient(of='match') need an "
                f"image-text matching model (jaxvqa.load_matcher)"
            )
        return name, model

    def _named(self, name: str | None, *, matches: bool) -> tuple[str, VLM | Matcher]:
        fit = [known for known, model in self.models.items() if isinstance(model, Matcher) == matches]
        if matches and not fit and (name is None or name not in self.models):
            raise UserError(
                f"the engine has no image-text matching model; give it one: models={{{MATCHER!r}: "
                f"jaxvqa.load_matcher(...)}}"
            )
        name = fit[0] if name is None else name
        if name not in self.models:
            raise methods.unknown("model", name, self.models)
        return name, self.models[name]

    def preprocessed(self, model: str, image: Image.Image, setup: str | None = None) -> "_Preprocessed":
        """An image as the model's encoder wants it; computed once while the same PIL image is alive."""
        name = (id(image), model, setup)
        if name not in self._preprocessed:
            made, digest = self.models[model].process(image, setup=setup), blake2b(digest_size=16)
            for leaf in jax.tree.leaves(made.arrays):
                digest.update(leaf.tobytes())
            self._preprocessed[name] = _Preprocessed((model, made.capacity, digest.digest()), made)
            weakref.finalize(image, self._preprocessed.pop, name, None)
        return self._preprocessed[name]

    def size(self, key: Hashable) -> int:
        """Rows of a batch of the program `key`."""
        return self._sizes.get(key, self.batch_size)

    def shrink(self, key: Any, size: int) -> bool:
        """Halve the batch of a program that ran out of memory with `size` rows; False when it cannot be smaller."""
        half = -(-size // (2 * self._ways)) * self._ways
        if half < self.size(key):  # otherwise another batch in flight has done it
            self._sizes[key] = half
            warnings.warn(f"out of memory: {key[0].name} now runs in batches of {half}, not {size}", stacklevel=2)
        return half < size

    def run(self, samples: Iterable[Sample], method: str | Callable = "vanilla", **options: Any) -> Iterator[Answer]:
        """Answer samples, in their order; one that fails gets an answer with status "error".

        method, options: as in `methods.resolve`, which raises UserError for unknown ones.
        """
        bound = methods.bind(methods.resolve(method, **options), self.default.facts)
        return iter(_Run(self, samples, bound))


def _by_name(models: VLM | Mapping[str, VLM | Matcher]) -> dict[str, VLM | Matcher]:
    """Models by name; a single one has its own."""
    return dict(models) if isinstance(models, Mapping) else {models.name: models}


def _ways(model: VLM | Matcher) -> int:
    """Over how many parts of its mesh a model splits a batch."""
    return 1 if model.mesh is None else math.prod(model.mesh.shape[axis] for axis in RULES["batch"])


class _Preprocessed(NamedTuple):
    name: Hashable
    """The same for images that the model cannot tell apart."""
    input: ImageInput


class _Shared:
    """Results by name, bounded in bytes; the least recently used go first."""

    def __init__(self, capacity: int):
        self.capacity, self.bytes = capacity, 0
        self.items: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, name: Hashable) -> Any:
        if name in self.items:
            self.items.move_to_end(name)
        return self.items.get(name)

    def put(self, name: Hashable, value: Any) -> None:
        self.bytes += _nbytes(value) - _nbytes(self.items.pop(name, ()))
        self.items[name] = value
        while self.bytes > self.capacity:
            self.bytes -= _nbytes(self.items.popitem(last=False)[1])


def _nbytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(value))


@dataclass(eq=False)
class _Job:
    """One sample and where its generator stands."""

    index: int
    sample: Sample
    generator: Any = None
    started: float = field(default_factory=time.perf_counter)
    bytes: int = 0
    """Of its decoded images."""
    kept: "weakref.WeakSet[State]" = field(default_factory=weakref.WeakSet)
    """Caches that its generator may still continue from."""
    many: bool | None = None
    """Whether the generator yielded a list, and gets one back; None before its first yield."""
    pending: int = 0
    results: dict[int, Any] = field(default_factory=dict)
    asked: int = 0
    total: int = 0
    """Logical passes, without those of matching models."""
    last: int = 0
    """Of them, those of the last yield."""
    passes: Counter = field(default_factory=Counter)
    """All, by handler."""
    images: set = field(default_factory=set)
    tokens: int = 0
    flops: int = 0
    log: list[Asked] = field(default_factory=list)


@dataclass(eq=False)
class _Ticket:
    """Work that waits for a batch, and whom to tell."""

    order: tuple[int, int]
    work: Any
    """A `Work`, when the request is made ready."""
    done: Callable[[Any], None]
    missing: int = 0


class _Run:
    """One run over samples; iterate for the answers."""

    def __init__(self, engine: Engine, samples: Iterable[Sample], method: Callable):
        self.engine, self.method = engine, method
        self.source: Any = iter(samples)  # None when it is exhausted
        self.begun = self.due = 0
        self.jobs: dict[int, _Job] = {}
        self.ready: deque[_Job] = deque()
        self.waiting: dict[Any, list[_Ticket]] = {}
        self.needed: dict[Hashable, list[_Ticket]] = {}
        self.flying: deque[tuple[list[_Ticket], int, Callable[[], list]]] = deque()
        self.answers: dict[int, Answer] = {}

    def __iter__(self) -> Iterator[Answer]:
        while True:
            while self.due in self.answers:
                self.due += 1
                yield self.answers.pop(self.due - 1)
            if len(self.flying) < DEPTH and (full := self.full()):
                self.dispatch(self.oldest(full))
            elif self.ready:
                self.resume(self.ready.popleft())
            elif self.room():
                self.begin()
            elif self.flying:
                self.land()
            elif self.waiting:
                self.dispatch(self.oldest(self.waiting))
            else:
                return

    def full(self) -> list[Hashable]:
        """Groups that fill a batch; those of prefixes only while there is memory for more."""
        full = [key for key, queue in self.waiting.items() if len(queue) >= self.engine.size(key)]
        return [key for key in full if key[0] is not PREFIXES or not self.engine.crowded]

    def oldest(self, keys: Iterable[Hashable]) -> Hashable:
        """Of groups, the one in which the first request waits."""
        return min(keys, key=lambda key: min(ticket.order for ticket in self.waiting[key]))

    def room(self) -> bool:
        """Whether another sample may begin."""
        size, held = self.engine.batch_size, sum(job.bytes for job in self.jobs.values())
        few = len(self.jobs) < AHEAD * size and self.begun - self.due < LOOK_AHEAD * size
        kept = sum(state.nbytes for job in self.jobs.values() for state in job.kept)
        within = held < self.engine.in_flight_bytes and kept <= self.engine.cache_bytes
        return self.source is not None and (not self.jobs or (few and within))

    def begin(self) -> None:
        """Start the next sample's generator."""
        try:
            sample = next(self.source)
        except StopIteration:
            self.source = None
            return
        index, self.begun = self.begun, self.begun + 1
        job = self.jobs[index] = _Job(index, sample)
        try:
            job.sample = self.opened(sample, index)
            job.bytes = sum(image.width * image.height * 3 for image in job.sample.images)
            job.generator = self.method(job.sample)
            if not hasattr(job.generator, "send"):
                name = methods.method_name(self.method)
                raise UserError(f"method {name!r} is no generator function: it must yield requests")
        except Exception as error:
            self.finish(job, error=error)
        else:
            self.ready.append(job)

    def opened(self, sample: Sample, index: int) -> Sample:
        if not isinstance(sample, Sample):
            raise UserError(f"sample {index} is a {type(sample).__name__}; expected jaxvqa.Sample(images, question)")
        if not sample.question.strip():
            raise UserError(f"sample {sample.id or index}: the question is empty; ask something")
        images = tuple(open_image(image, exif=self.engine.exif) for image in sample.images)
        return replace(sample, id=sample.id or str(index), images=images)

    def resume(self, job: _Job) -> None:
        """Give a generator its results, or the first error among them, and take its next requests."""
        results = [job.results[number] for number in sorted(job.results)]
        job.results = {}
        error = next((result for result in results if isinstance(result, Exception)), None)
        try:
            if error is not None:
                asked = job.generator.throw(error)
            else:
                asked = job.generator.send(None if job.many is None else results if job.many else results[0])
        except StopIteration as stop:
            self.finish(job, stop.value)
            return
        except Exception as raised:
            self.finish(job, error=raised)
            return
        job.many = isinstance(asked, (list, tuple))
        requests = asked if job.many else [asked]
        job.pending = len(requests)
        # A further turn belongs to the reply that it continues.
        if not all(isinstance(request, Continue) and isinstance(request.of, Reply) for request in requests):
            job.last = 0
        if not requests:
            self.ready.append(job)
        for request in requests:
            self.submit(job, request)

    def submit(self, job: _Job, request: Any) -> None:
        """Make a request ready and queue it."""
        number, job.asked = job.asked, job.asked + 1

        def done(result: Any) -> None:
            if not isinstance(result, Exception):
                try:
                    self.account(job, request, ticket.work, result)
                except Exception as error:  # the user's own: what a `Call` returned has a faulty __str__, say
                    result = error
            job.results[number] = result
            if len(job.results) == job.pending:
                self.ready.append(job)

        ticket = _Ticket((job.index, number), None, done)
        try:
            if type(request) not in SERVED:
                served = ", ".join(kind.__name__ for kind in SERVED)
                raise UserError(f"this engine does not serve {type(request).__name__} requests; it serves {served}")
            ticket.work = SERVED[type(request)].prepare(self.engine, request, (_hash(job.sample.id), number))
        except Exception as error:
            done(error)
        else:
            self.queue(ticket)

    def queue(self, ticket: _Ticket) -> None:
        """Queue work; what it needs, and what that needs, is queued before it."""
        for name, work in ticket.work.needs.items():
            if (value := self.engine.shared[work.key[0]].get(name)) is not None:
                ticket.work.got[name] = value
                continue
            ticket.missing += 1
            if name not in self.needed:
                self.needed[name] = []
                self.queue(_Ticket(ticket.order, work, partial(self.supply, work.key[0], name)))
            self.needed[name].append(ticket)
        if not ticket.missing:
            self.enqueue(ticket)

    def supply(self, handler: Any, name: Hashable, value: Any) -> None:
        """Hand a shared result, or the error in its place, to all who wait for it."""
        if not isinstance(value, Exception):
            self.engine.shared[handler].put(name, value)
        for ticket in self.needed.pop(name):
            ticket.work.got[name] = value
            ticket.missing -= 1
            if ticket.missing:
                continue
            error = next((got for got in ticket.work.got.values() if isinstance(got, Exception)), None)
            self.enqueue(ticket) if error is None else self.deliver(ticket, error)

    def deliver(self, ticket: _Ticket, result: Any) -> None:
        """Let go of what the work needed (it may be much), and tell who waits for the result."""
        ticket.work.got.clear()
        ticket.done(result)

    def enqueue(self, ticket: _Ticket) -> None:
        self.waiting.setdefault(ticket.work.key, []).append(ticket)

    def dispatch(self, key: Hashable) -> None:
        """Send the first rows of a group to the device."""
        queue, size = sorted(self.waiting.pop(key), key=lambda ticket: ticket.order), self.engine.size(key)
        batch, rest = queue[:size], queue[size:]
        if rest:
            self.waiting[key] = rest
        collect = self.guard(batch, size, lambda: self.launch(key, batch, size))
        if collect is not None:
            self.flying.append((batch, size, collect))

    def launch(self, key: Any, batch: list[_Ticket], size: int) -> Callable[[], list]:
        handler, stats = key[0], self.engine.stats
        collect = handler.launch(self.engine, [ticket.work for ticket in batch], size)
        stats.batches[handler.name] += 1
        stats.rows[handler.name] += len(batch)
        stats.padding[handler.name] += size - len(batch)
        stats.flops += size * batch[0].work.padded_flops
        return collect

    def land(self) -> None:
        """Wait for the oldest batch on the device, and deliver its results."""
        batch, size, collect = self.flying.popleft()
        for ticket, result in self.guard(batch, size, lambda: list(zip(batch, collect(), strict=True))) or ():
            self.deliver(ticket, result)

    def guard(self, batch: list[_Ticket], size: int, act: Callable[[], Any]) -> Any:
        """Act for a batch; None where that fails: out of memory requeues it, any other failure is each row's error."""
        try:
            return act()
        except Exception as error:
            exhausted = isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
            if exhausted and self.engine.shrink(batch[0].work.key, size):
                for ticket in batch:
                    self.enqueue(ticket)
            else:
                for ticket in batch:
                    self.deliver(ticket, error)

    def account(self, job: _Job, request: Request, work: Work, result: Any) -> None:
        """Count what one request cost its sample, and log it."""
        said, (tokens, flops) = _brief(result), work.cost(result)
        if isinstance(state := getattr(result, "state", None), State):
            job.kept.add(state)
        for name, need in work.needs.items():
            if need.flops and name not in job.images:
                job.images.add(name)
                flops += need.flops
        job.passes[work.key[0].name] += request.passes
        if not work.apart:
            job.total += request.passes
            job.last += request.passes
        job.tokens += tokens
        job.flops += flops
        job.log.append(Asked(type(request).__name__, work.text, said))

    def finish(self, job: _Job, answer: Any = None, error: Exception | None = None) -> None:
        """File the answer of a generator that has returned or failed."""
        if error is None and not isinstance(answer, Answer):
            error = UserError(f"the method returned {type(answer).__name__}; expected jaxvqa.Answer(text, ...)")
        if error is not None:
            answer = Answer("", status="error", error=error)
        final = 0 if error is not None else job.last
        model = self.engine.default
        self.answers[job.index] = replace(
            answer,
            forward_passes=Passes(job.total - final, final),
            cost=Cost(dict(job.passes), len(job.images), job.tokens, job.flops),
            log=tuple(job.log),
            seconds=time.perf_counter() - job.started,
            sample=job.sample.id if isinstance(job.sample, Sample) else str(job.index),
            method=methods.method_name(self.method),
            options=methods.method_options(self.method),
            model=model.name,
            image_setup=model.image_setup,
        )
        del self.jobs[job.index]


def ask(
    model: VLM,
    image: Any,
    question: str,
    method: str | Callable = "vanilla",
    *,
    models: Mapping[str, VLM | Matcher] | None = None,
    **options: Any,
) -> Answer:
    """Answer one question about an image (or a list of images).

    models: further models by name. Without a "matcher" among them the one that the method's options name is loaded.
    Raises what went wrong, where `ask_many` records it; `JaxVQAError` for wrong input.
    """
    method = methods.resolve(method, **options)
    answer = next(Engine(_with_matcher(model, method, models), batch_size=1).run([Sample(image, question)], method))
    if answer.error is not None:
        raise answer.error
    return answer


def ask_many(
    model: VLM | Mapping[str, VLM | Matcher],
    samples: Iterable[Sample],
    method: str | Callable = "vanilla",
    *,
    batch_size: int = 8,
    progress: bool | None = None,
    models: Mapping[str, VLM | Matcher] | None = None,
    **options: Any,
) -> Iterator[Answer]:
    """Answer many questions, in their order; a sample that fails gets an answer with status "error".

    progress: show a bar on stderr; None shows it on a terminal once the run has taken some seconds.
    models: as in `ask`.
    """
    from tqdm import tqdm

    method = methods.resolve(method, **options)
    answers = Engine(_with_matcher(model, method, models), batch_size=batch_size).run(samples, method)
    total = len(samples) if isinstance(samples, Sized) else None
    return iter(tqdm(answers, total=total, delay=3, unit="sample", disable=None if progress is None else not progress))


def matcher_of(method: Any, vlm: VLM, *, offline: bool = False) -> dict[str, Matcher]:
    """The matching model that the `matcher` option of a method on `vlm` names, as "matcher"; empty where it names none.

    Loaded once per process. Raises UserError where it cannot be had.
    """
    bound = methods.bind(method, vlm.facts)
    source = getattr(bound, "matcher", None) or getattr(getattr(bound, "like", None), "matcher", None)
    if source is None:
        return {}
    try:
        return {MATCHER: matcher_of_method(source, vlm.mesh, offline)}
    except JaxVQAError as error:
        raise UserError(f"{methods.method_name(method)}: cannot load matcher={source!r}: {error}") from error


def _with_matcher(model, method, models) -> dict[str, VLM | Matcher]:
    """All models of a run: those given, and the method's matcher unless one is."""
    given = _by_name(model) | dict(models or {})
    vlm = next((one for one in given.values() if not isinstance(one, Matcher)), None)
    return given if MATCHER in given or vlm is None else given | matcher_of(method, vlm)


def _hash(text: str) -> int:
    """32 bits of a text, the same in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest())


def _brief(result: Any) -> str:
    """A result in one short line of the log."""
    if isinstance(result, Reading):
        return ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(result.value))
    if isinstance(result, np.ndarray):
        return np.array2string(result, precision=4, threshold=16)
    text = getattr(result, "text", None)
    return text if isinstance(text, str) else str(result)[:200]


__all__ = ["Engine", "Stats", "ask", "ask_many"]
