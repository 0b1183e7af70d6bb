"""Prompts: chat templates, question endings, and where every phrase and image lies in the token sequence.

A `Prompt` is a sequence of text pieces and image slots, each with a role; `tokenise` turns it into ids. Two ways of
doing so exist in the wild and give different ids:

* chunk-wise (original LLaVA): the text is split at the images and each chunk is tokenised on its own, so that with a
  Llama tokenizer the chunk after an image starts with its own SentencePiece prefix space; BOS only on the first chunk;
* joined (transformers' processors): the whole string is tokenised at once, the image marker being one added token.

The template knows which of the two its published results used.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, pairwise
from typing import Any

import numpy as np

from jaxvqa.errors import JaxVQAError, UserError

MARKER = "<image>"

# ViCrop's own strings (relative attention divides by the map of the general question).
SHORT_ANSWER = "Answer the question using a single word or phrase."
GENERAL_QUESTION = "Write a general description of the image."

_SYSTEM = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)


@dataclass(frozen=True)
class Template:
    """How turns become one string.

    `system` opens the prompt, `user` each question, `assistant` each answer; a past answer follows `answer_start` and
    is closed by `answer_end`, the one that is asked for follows `answer_open` (an empty thinking block).
    `image_open` and `image_close` stand around each image's tokens.
    Images without a marker of their own go before the first question, each followed by `image_break`; with
    `images_first` they precede `user` and are followed by one `image_break` in all.
    With `images_outside` their tokens precede even the one that begins a text (BOS).
    `ending_break` is what separates the question from the `short` ending; `ending` is the ending used by default.
    `conversions` are the question "{}" with an image as chat templates of converted checkpoints put it, which leave out
    some of what the checkpoints were trained with.
    """

    name: str
    system: str
    user: str = "USER: "
    assistant: str = " ASSISTANT:"
    answer_start: str = " "
    answer_open: str = ""
    answer_end: str = "</s>"
    image_open: str = ""
    image_close: str = ""
    images_first: bool = False
    image_break: str = "\n"
    ending: str = "open"
    ending_break: str = "\n"
    joined: bool = False
    images_outside: bool = False
    conversions: tuple[str, ...] = ()


def _chatml(
    name: str,
    system: str,
    image_open: str = "",
    image_close: str = "",
    image_break: str = "\n",
    ending_break: str = " ",
) -> Template:
    """The turns of the Qwen models, and of those that have one as their decoder."""
    return Template(
        name,
        system,
        user="<|im_start|>user\n",
        assistant="<|im_end|>\n<|im_start|>assistant\n",
        answer_start="",
        answer_end="<|im_end|>\n",
        image_open=image_open,
        image_close=image_close,
        image_break=image_break,
        ending_break=ending_break,
        joined=True,
    )


_HELPFUL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_VISION = "<|vision_start|>", "<|vision_end|>", ""

TEMPLATES = {
    template.name: template
    for template in (
        Template("vicuna_v1", _SYSTEM.format(who="user") + " ", conversions=("USER: <image>\n{} ASSISTANT:",)),
        Template("llava_v1", _SYSTEM.format(who="human") + " "),
        Template(
            "vicrop_hf",
            system="",
            assistant="\nASSISTANT:",
            images_first=True,
            ending="short",
            ending_break=" ",
            joined=True,
        ),
        replace(  # LLaVA-OneVision
            _chatml("qwen_1_5", _HELPFUL, ending_break="\n"),
            conversions=(
                "<|im_start|>user\n<image>\n{}<|im_end|>\n<|im_start|>assistant\n",
                "<|im_start|>user <image>\n{}<|im_end|><|im_start|>assistant\n",
            ),
        ),
        _chatml("qwen2_5_vl", _HELPFUL, *_VISION),
        _chatml("qwen3_vl", "", *_VISION),
        _chatml("internvl", "", "<img>", "</img>"),
        Template(
            "instructblip",
            "",
            user="Question: ",
            assistant=" Short answer:",
            answer_end="\n",
            images_first=True,
            image_break="",
            joined=True,
            images_outside=True,
        ),
    )
}


@dataclass(frozen=True)
class Ending:
    """What an answer protocol adds: `before` + question + `after`, with one line of the form `option` per option."""

    after: str = ""
    before: str = ""
    option: str = ""


ENDINGS = {
    "open": Ending(),
    "short": Ending("\n" + SHORT_ANSWER),
    "mcq_letter": Ending(
        "\n{options}Answer with the option's letter from the given choices directly.", option="{letter}. {text}\n"
    ),
    # V*Bench: the same sentence after lines "(A) ...".
    "mcq_letter_parens": Ending(
        "\n{options}Answer with the option's letter from the given choices directly.", option="({letter}) {text}\n"
    ),
    "hrbench_letter": Ending("\n{options}Answer the option letter directly.", option="{letter}. {text}\n"),
    "hrbench_official": Ending(
        "\nOptions:\n{options}Please select the correct answer from the options above. \n",
        before="Question: ",
        option="{letter}. {text}\n",
    ),
    # The data set's options carry their own letters, "(A) ...".
    "mme_realworld": Ending(
        "\n{options}Select the best answer to the above multiple-choice question based on the image. Respond with only "
        "the letter (A, B, C, D, or E) of the correct option.\nThe best answer is:",
        option="{text}\n",
    ),
    "logits_match": Ending(),
}


@dataclass(frozen=True)
class ImageSlot:
    """The place of image number `index` (in the order in which the images are given)."""

    index: int


@dataclass(frozen=True)
class Prompt:
    """Text pieces and image slots in order, with one role per chunk.

    Roles: "system", "template" (what the template writes), "user" (the question), "ending" (options and answer
    instruction), "assistant" (answers of past turns) and "image".
    """

    chunks: tuple[str | ImageSlot, ...]
    roles: tuple[str, ...]
    joined: bool = False
    images_outside: bool = False

    def __post_init__(self):
        for chunk, role in zip(self.chunks, self.roles, strict=True):
            if isinstance(chunk, str) and MARKER in chunk:
                raise UserError(
                    f"the {role} text {chunk!r} contains {MARKER}: write it in questions only, for an image"
                )

    @property
    def text(self) -> str:
        """The prompt as one string, images written as `<image>`; character ranges refer to it."""
        return "".join(chunk if isinstance(chunk, str) else MARKER for chunk in self.chunks)

    @property
    def num_images(self) -> int:
        return sum(isinstance(chunk, ImageSlot) for chunk in self.chunks)


def render(
    template: str | Template,
    turns: str | Sequence[str],
    num_images: int | None = None,
    *,
    ending: str | None = None,
    options: Sequence[str] = (),
) -> Prompt:
    """The prompt that asks the last of `turns`.

    turns: a question, or question, answer, question, ... ending with a question. A question may hold `<image>`
        markers; the images then stand exactly there, in all turns together `num_images` of them.
    num_images: how many images there are (default: the number of markers, or one).
    ending: a name in `ENDINGS`, applied to the last question (default: the template's own).
    options: the answer options, for the endings that list them.

    Raises UserError for an empty question, an unknown template or ending, counts that do not agree, and a marker in an
    answer or an option.
    """
    template = as_template(template)
    closing = _named(template.ending if ending is None else ending, ENDINGS, "ending")
    turns = [turns] if isinstance(turns, str) else list(turns)
    if len(turns) % 2 == 0:
        raise UserError(f"a conversation of {len(turns)} turns has no question to answer; end it with the user's turn")
    for number, question in enumerate(turns[::2], 1):
        if not question.replace(MARKER, "").strip():
            raise UserError(f"question {number} is empty: {question!r}; ask something")

    markers = sum(question.count(MARKER) for question in turns[::2])
    num_images = (markers or 1) if num_images is None else num_images
    if markers not in (0, num_images):
        raise UserError(
            f"the question has {markers} {MARKER} markers for {num_images} images; "
            f"write one marker per image, or none to put the images first"
        )

    build = _Builder(template)
    build.text(template.system, "system")
    placed = 0 if markers else num_images
    if template.images_first and placed:
        build.images(placed)
        build.text(template.image_break, "template")
    for number, turn in enumerate(turns):
        if number % 2:
            build.text(template.answer_start, "template")
            build.text(turn, "assistant")
            build.text(template.answer_end, "template")
            continue
        build.text(template.user, "template")
        if number == 0 and not template.images_first:
            for _ in range(placed):
                build.images(1)
                build.text(template.image_break, "template")
        if number == len(turns) - 1:
            before, after = _expand(closing, options, template)
            build.text(before, "ending")
            build.user(turn)
            build.text(after, "ending")
        else:
            build.user(turn)
        build.text(template.assistant, "template")
    build.text(template.answer_open, "template")
    return build.prompt()


def as_template(template: str | Template) -> Template:
    """A template, or the one of `TEMPLATES` that has this name. Raises UserError for an unknown name."""
    return _named(template, TEMPLATES, "template") if isinstance(template, str) else template


_TURNS = "⟦1⟧", "⟦2⟧", "⟦3⟧"


def from_chat_template(tokenizer: Any, chat_template: str, image_token_id: int, base: Template) -> Template | None:
    """A checkpoint's own chat template as a `Template`, thinking modes off; None where it shows no images.

    Conversations of known texts are rendered, and cut at these. What turns and images do not show is `base`'s: what
    stands around an image's tokens, how a text is tokenised, the endings.

    tokenizer: of transformers; it renders.
    chat_template: in Jinja, a message's content being a list of {"type": "image"} and {"type": "text", "text": ...}.
    base: the family's template; itself the result where the chat template says the same, or one of its `conversions`.
    Raises JaxVQAError where the chat template fails, or does not put turns and images together from fixed parts.
    """
    import jinja2

    image = tokenizer.convert_ids_to_tokens(image_token_id) or MARKER
    # The tokenizer writes it by itself.
    begin = tokenizer.bos_token if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""

    def said(turns: int, images: int, ask: bool = True) -> str:
        contents = [[{"type": "text", "text": text}] for text in _TURNS[:turns]]
        contents[0] = [*[{"type": "image"}] * images, *contents[0]]
        messages = [dict(role=r, content=c) for r, c in zip(cycle(("user", "assistant")), contents, strict=False)]
        text = tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=ask, enable_thinking=False
        )
        # What stands around an image some chat templates leave to the processor.
        text = text.replace(base.image_open + image + base.image_close, image)
        return text.removeprefix(begin).replace(image, MARKER)

    try:
        shown = said(1, 1)
    except (TypeError, jinja2.UndefinedError):  # a language model's takes the content for a string
        return None
    except jinja2.TemplateError as error:
        raise JaxVQAError(f"the chat template fails: {error}") from error
    if MARKER not in shown:
        return None
    if shown in [text.replace("{}", _TURNS[0]) for text in base.conversions]:
        return base
    try:
        probes = {(turns, images): said(turns, images) for turns in (1, 3) for images in range(3)}
        closed = said(2, 0, ask=False)
    except (TypeError, jinja2.TemplateError) as error:
        raise JaxVQAError(f"the chat template fails: {error}") from error
    for template in (base, *_cut(base, probes[3, 0], closed, shown)):
        bare = replace(template, image_open="", image_close="")
        if all(render(bare, _TURNS[:n], images, ending="open").text == text for (n, images), text in probes.items()):
            return template
    raise JaxVQAError(
        f"the chat template does not put turns and images together from fixed parts: {probes[1, 2]!r}, "
        f"and without images {probes[3, 0]!r}"
    )


def _cut(base: Template, whole: str, closed: str, shown: str) -> list[Template]:
    """Templates that may be meant, by what turns look like, a conversation closed by its answer, and an image."""
    parts = re.split("|".join(_TURNS), whole)
    if len(parts) != 4:
        return []
    head, begun, between, asked = parts
    assistant = begun[: _alike(begun, asked)]
    # What repeats is the user's turn, without what closes an answer.
    repeated = between.removeprefix(closed.partition(_TURNS[1])[2])
    user = head[len(head) - _alike(head[::-1], repeated[::-1]) :]
    found = replace(
        base,
        name="chat_template",
        system=head.removesuffix(user),
        user=user,
        assistant=assistant,
        answer_start=begun.removeprefix(assistant),
        answer_open=asked.removeprefix(assistant),
        answer_end=between.removesuffix(user),
        images_first=False,
        images_outside=False,
        conversions=(),
    )
    before, _, after = shown.partition(_TURNS[0])[0].partition(MARKER)
    user = head.removeprefix(before)
    first = replace(found, system=before, user=user, answer_end=between.removesuffix(user), images_first=True)
    return [replace(found, image_break=after), replace(first, image_break=after.removesuffix(user))]


def _alike(a: str, b: str) -> int:
    """How many characters two strings begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def worded(
    question: str, ending: str = "open", options: Sequence[str] = (), template: str | Template = "vicuna_v1"
) -> str:
    """A question as `render` words it under an ending: for a text of one's own that it is to be part of.

    Raises UserError for an unknown template or ending, and for options that the ending does not list, or lacks.
    """
    template = as_template(template)
    before, after = _expand(_named(ending, ENDINGS, "ending"), options, template)
    return before + question + after


def stem(question: str) -> str:
    """A question without image markers, and without options in its own text: what a map is made for.

    Options are what follows a line that begins with "(A)", "A.", "A)" or "A:", or says "Options:".

    >>> stem("<image>\\nWhat is on the sign?\\n(A) A bird\\n(B) A cat\\nAnswer with the option's letter.")
    'What is on the sign?'
    """
    return re.split(r"\n\s*(?:\(A\)|A[.):]|Options:)\s", question.replace(MARKER, ""), maxsplit=1)[0].strip()


class _Builder:
    def __init__(self, template: Template):
        self.template, self.chunks, self.roles, self.count = template, [], [], 0

    def text(self, text: str, role: str):
        if text:
            self.chunks.append(text)
            self.roles.append(role)

    def images(self, number: int):
        for _ in range(number):
            self.text(self.template.image_open, "template")
            self.chunks.append(ImageSlot(self.count))
            self.roles.append("image")
            self.count += 1
            self.text(self.template.image_close, "template")

    def user(self, question: str):
        for number, piece in enumerate(question.split(MARKER)):
            self.images(min(number, 1))
            self.text(piece, "user")

    def prompt(self) -> Prompt:
        template = self.template
        return Prompt(tuple(self.chunks), tuple(self.roles), template.joined, template.images_outside)


def _named(name: str, table: dict, kind: str):
    if name not in table:
        raise UserError(f"unknown {kind} {name!r}; known: {', '.join(table)}")
    return table[name]


def _expand(ending: Ending, options: Sequence[str], template: Template) -> tuple[str, str]:
    """What stands before and after the question."""
    if bool(options) != bool(ending.option):
        name = next(name for name, known in ENDINGS.items() if known == ending)
        raise UserError(f"ending {name!r} {'needs options' if ending.option else 'lists no options'}; got {options!r}")
    lines = "".join(ending.option.format(letter=chr(65 + i), text=text) for i, text in enumerate(options))
    after = ending.after.replace("{options}", lines)
    if ending == ENDINGS["short"]:
        after = template.ending_break + SHORT_ANSWER
    return ending.before, after


@dataclass(frozen=True)
class Segment:
    """Tokens start..stop-1, all of one role."""

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class Tokens:
    """A tokenised prompt.

    ids: int32 [T], image tokens included (`image_token_id` repeated).
    offsets: int32 [T, 2], the characters of `text` that each token covers; empty for BOS and image tokens.
    image_spans: (start, length) per image, in prompt order.
    segments: runs of tokens of one role, in order, covering all T tokens. A token that straddles two roles has the
        role of its last character ("▁What" after "USER: " is the user's).
    """

    ids: np.ndarray
    offsets: np.ndarray
    image_spans: tuple[tuple[int, int], ...]
    segments: tuple[Segment, ...]
    text: str

    @property
    def last(self) -> int:
        """The last prompt position: its logits predict the first answer token."""
        return len(self.ids) - 1

    def indices(self, *roles: str) -> np.ndarray:
        """Token indices (int32) of the given roles, ascending."""
        runs = [np.arange(s.start, s.stop, dtype=np.int32) for s in self.segments if s.role in roles]
        return np.concatenate([np.zeros(0, np.int32), *runs])

    def span(self, phrase: str | tuple[int, int], occurrence: int = 0) -> np.ndarray:
        """Token indices (int32) that overlap a phrase of `text`, or a character range (start, stop) of it.

        `occurrence` picks among several occurrences of a phrase (-1: the last). Raises UserError if there is none.
        """
        if isinstance(phrase, str):
            found = [match.start() for match in re.finditer(f"(?={re.escape(phrase)})", self.text)] if phrase else []
            if not -len(found) <= occurrence < len(found):
                raise UserError(f"phrase {phrase!r} (occurrence {occurrence}) is not in the prompt {self.text!r}")
            start = found[occurrence]
            stop = start + len(phrase)
        else:
            start, stop = phrase
            if not 0 <= start < stop <= len(self.text):
                raise UserError(f"character range {start}..{stop} is outside the prompt of {len(self.text)} characters")
        begin, end = self.offsets.T
        # Empty ranges (BOS, image tokens) overlap nothing.
        return np.flatnonzero((begin < stop) & (end > start) & (begin < end)).astype(np.int32)


def tokenise(tokenizer, prompt: Prompt, image_token_id: int, image_tokens: int | Sequence[int]) -> Tokens:
    """Token ids of a prompt, each image as `image_tokens` (one number, or one per image) copies of `image_token_id`.

    tokenizer: a fast tokenizer of transformers (it must give offsets).
    Raises JaxVQAError if the tokenizer does not know the marker `<image>` as `image_token_id` (joined templates),
    UserError if the text itself contains that token or the number of images does not fit.
    """
    counts = [image_tokens] * prompt.num_images if isinstance(image_tokens, int) else list(image_tokens)
    if len(counts) != prompt.num_images:
        raise UserError(f"the prompt has {prompt.num_images} images, token counts are given for {len(counts)}")
    ids, offsets = (_joined if prompt.joined else _chunkwise)(tokenizer, prompt, image_token_id)

    slots = np.flatnonzero(ids == image_token_id)
    repeats = np.ones(len(ids), np.int64)
    repeats[slots] = counts
    starts = np.cumsum(repeats) - repeats
    spans = tuple((int(starts[slot]), count) for slot, count in zip(slots, counts, strict=True))
    roles = np.repeat(_roles(prompt, offsets), repeats)
    for start, length in spans:
        roles[start : start + length] = "image"
    return Tokens(
        ids=np.repeat(ids, repeats).astype(np.int32),
        offsets=np.repeat(offsets, repeats, axis=0).astype(np.int32),
        image_spans=spans,
        segments=_runs(roles),
        text=prompt.text,
    )


def _encode(tokenizer, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    return list(encoding["input_ids"]), [tuple(pair) for pair in encoding["offset_mapping"]]


def _chunkwise(tokenizer, prompt: Prompt, image_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """One placeholder per image; each text between images tokenised alone, BOS only before the first."""
    ids, offsets, position = [], [], 0
    for number, chunk in enumerate(prompt.text.split(MARKER)):
        if number:
            ids.append(image_token_id)
            offsets.append((position, position))
            position += len(MARKER)
        # The slow Llama tokenizer of LLaVA gives the text after "</s>" a prefix space of its own as well.
        for piece_number, piece in enumerate(_after_stops(chunk, tokenizer.eos_token)):
            new_ids, new_offsets = _encode(tokenizer, piece, special=number == piece_number == 0)
            if image_token_id in new_ids:
                raise UserError(f"the text {piece!r} contains the image token itself (id {image_token_id})")
            ids += new_ids
            offsets += [(start + position, stop + position) for start, stop in new_offsets]
            position += len(piece)
    return np.array(ids, np.int64), np.array(offsets, np.int64).reshape(-1, 2)


def _after_stops(text: str, stop: str | None) -> list[str]:
    """`text` cut after each stop token, nothing lost."""
    if not stop or stop not in text:
        return [text]
    head, *tail = text.split(stop)
    pieces = [head + stop, *(piece + stop for piece in tail[:-1]), tail[-1]]
    return [piece for piece in pieces if piece]


def _joined(tokenizer, prompt: Prompt, image_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole string at once; the tokenizer's own image marker must be one added token."""
    if prompt.images_outside:
        return _outside(tokenizer, prompt, image_token_id)
    marker = tokenizer.convert_ids_to_tokens(image_token_id) or MARKER
    if marker != MARKER and marker in prompt.text:
        raise UserError(f"the text {prompt.text!r} contains the image token itself ({marker})")
    ids, offsets = _encode(tokenizer, prompt.text.replace(MARKER, marker), special=True)
    ids, offsets = np.array(ids, np.int64), np.array(offsets, np.int64).reshape(-1, 2)
    slots = ids == image_token_id
    if (found := int(slots.sum())) != prompt.num_images:
        raise JaxVQAError(
            f"the tokenizer finds {found} image tokens (id {image_token_id}) in a prompt with {prompt.num_images} "
            f"images; it must know {marker!r} as one added token"
        )
    longer = (np.cumsum(slots) - slots) * (len(marker) - len(MARKER))  # of the images before each token
    offsets = np.where((offsets[:, :1] < offsets[:, 1:]) | slots[:, None], offsets - longer[:, None], 0)
    offsets[slots, 1] = offsets[slots, 0]
    return ids, offsets


def _outside(tokenizer, prompt: Prompt, image_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """One image token per image, and then the text as it is without them."""
    count = prompt.num_images
    text = prompt.text.removeprefix(MARKER * count)
    if MARKER in text:
        raise UserError(f"the prompt {prompt.text!r} has an image behind text; this model takes images first")
    ids, offsets = _encode(tokenizer, text, special=True)
    first = len(MARKER) * np.arange(count)
    offsets = np.array(offsets, np.int64).reshape(-1, 2) + len(MARKER) * count
    return np.array([image_token_id] * count + ids, np.int64), np.concatenate([np.stack([first, first], 1), offsets])


def _roles(prompt: Prompt, offsets: np.ndarray) -> np.ndarray:
    """The role of each token, by its last character; tokens without characters (BOS) belong to the template."""
    lengths = [len(chunk) if isinstance(chunk, str) else len(MARKER) for chunk in prompt.chunks]
    chunk = np.searchsorted(np.cumsum(lengths), offsets[:, 1] - 1, side="right")
    roles = np.array([*prompt.roles, "template"], dtype=object)[np.minimum(chunk, len(prompt.roles))]
    return np.where(offsets[:, 0] < offsets[:, 1], roles, "template")


def _runs(roles: np.ndarray) -> tuple[Segment, ...]:
    cuts = [0, *(np.flatnonzero(roles[1:] != roles[:-1]) + 1).tolist(), len(roles)]
    return tuple(Segment(str(roles[a]), a, b) for a, b in pairwise(cuts) if a < b)
