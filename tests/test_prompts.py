"""Templates, endings, and the places of images and phrases in the token sequence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.prompts import (
    ENDINGS,
    GENERAL_QUESTION,
    SHORT_ANSWER,
    TEMPLATES,
    ImageSlot,
    render,
    stem,
    tokenise,
    worded,
)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
P = 9  # image tokens per image in these tests

# The words of the system prompt as Llama's vocabulary cuts them ("▁" is the word boundary).
LLAMA_PIECES = (
    "▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant ▁The ▁gives ▁helpful ▁detailed "
    "▁pol ite ▁answers ▁to ▁the ▁questions ▁US ER ▁What ▁is ▁this"
).split()


def llama_like(scheme):
    """SentencePiece BPE with byte fallback, as Llama: scheme "always" (legacy), or "first" (transformers 5)."""
    characters = sorted({c for c in "".join(LLAMA_PIECES) + ".,':?ASITN▁"} | {chr(c) for c in range(97, 123)})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    merges = []
    for word in LLAMA_PIECES:
        for cut in range(1, len(word)):
            merge = (word[:cut], word[cut])
            if word[: cut + 1] not in pieces:
                merges.append(merge)
                pieces.append(word[: cut + 1])
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    if scheme == "always":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return finish(tokenizer)


def byte_level():
    """Byte-level BPE trained on a few prompts, as the bundled model has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SYSTEM, GENERAL_QUESTION, SHORT_ANSWER, "USER: What is this? ASSISTANT:"], trainer)
    return finish(tokenizer)


def finish(tokenizer):
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<s>", "</s>", "<image>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"legacy": llama_like("always"), "first": llama_like("first"), "bytes": byte_level()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def image_id(tokenizer):
    return tokenizer.convert_tokens_to_ids("<image>")


def tokens_of(tokenizer, prompt, count=P):
    return tokenise(tokenizer, prompt, image_id(tokenizer), count)


def segments(tokens, *roles):
    """The text under each run of tokens."""
    return [
        tokens.text[tokens.offsets[s.start, 0] : tokens.offsets[s.stop - 1, 1]]
        for s in tokens.segments
        if s.role in roles
    ]


# Templates.


def test_vicuna_asks_one_question():
    prompt = render("vicuna_v1", "What is this?")
    assert prompt.text == f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT:"
    assert prompt.num_images == 1 and not prompt.joined


def test_llava_v1_differs_in_its_system_text_only():
    ours, vicuna = (render(name, "What is this?").text for name in ("llava_v1", "vicuna_v1"))
    assert ours == vicuna.replace("curious user", "curious human").replace("the user's", "the human's")


def test_vicrop_puts_images_first_and_keeps_its_suffix():
    S = "Answer the question using a single word or phrase."
    assert render("vicrop_hf", "What is this?").text == f"<image>\nUSER: What is this? {S}\nASSISTANT:"
    assert render("vicrop_hf", "What is this?", 2).text == f"<image><image>\nUSER: What is this? {S}\nASSISTANT:"
    assert (
        render("vicrop_hf", GENERAL_QUESTION).text
        == f"<image>\nUSER: Write a general description of the image. {S}\nASSISTANT:"
    )
    assert render("vicrop_hf", "Why?", 0).text == f"USER: Why? {S}\nASSISTANT:"


def test_a_conversation_has_no_space_after_the_stop_token():
    prompt = render("vicuna_v1", ["What is this?", "A cup.", "Which colour?"])
    assert prompt.text == f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT: A cup.</s>USER: Which colour? ASSISTANT:"
    again = render("vicrop_hf", ["What?", "A cup.", "Which colour?"], ending="open")
    assert again.text == "<image>\nUSER: What?\nASSISTANT: A cup.</s>USER: Which colour?\nASSISTANT:"


def test_markers_in_the_question_place_the_images():
    prompt = render("vicrop_hf", "<image>\nLook. <image>\nWhy?", 2, ending="open")
    assert prompt.text == "USER: <image>\nLook. <image>\nWhy?\nASSISTANT:"
    assert [c.index for c in prompt.chunks if isinstance(c, ImageSlot)] == [0, 1]
    later = render("vicuna_v1", ["<image>\nWhat?", "A cup.", "<image>\nAnd here?"])
    assert later.text == f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: A cup.</s>USER: <image>\nAnd here? ASSISTANT:"
    assert later.num_images == 2


def test_several_images_without_markers_each_get_their_own_line():
    assert render("vicuna_v1", "Why?", 2).text == f"{SYSTEM} USER: <image>\n<image>\nWhy? ASSISTANT:"


@pytest.mark.parametrize("question", ["", "  \n", "<image>\n"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_an_empty_question_is_an_error_of_the_request(template, question):
    with pytest.raises(UserError, match="question 1 is empty"):
        render(template, question)


def test_wrong_requests_name_what_is_known():
    with pytest.raises(UserError, match="unknown template 'alpaca'; known: vicuna_v1"):
        render("alpaca", "Why?")
    with pytest.raises(UserError, match="unknown ending 'long'; known: open, short"):
        render("vicuna_v1", "Why?", ending="long")
    with pytest.raises(UserError, match="2 <image> markers for 1 images"):
        render("vicuna_v1", "<image> and <image>: why?", 1)
    with pytest.raises(UserError, match="no question to answer"):
        render("vicuna_v1", ["Why?", "Because."])


# Endings.


@pytest.mark.parametrize(
    "ending, options, expected",
    [
        ("open", [], "Q?"),
        ("logits_match", [], "Q?"),
        ("short", [], "Q?\nAnswer the question using a single word or phrase."),
        (
            "mcq_letter",
            ["red", "blue"],
            "Q?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly.",
        ),
        (
            "mcq_letter_parens",
            ["red", "blue"],
            "Q?\n(A) red\n(B) blue\nAnswer with the option's letter from the given choices directly.",
        ),
        ("hrbench_letter", ["red", "{x}"], "Q?\nA. red\nB. {x}\nAnswer the option letter directly."),
        (
            "hrbench_official",
            ["red", "blue"],
            "Question: Q?\nOptions:\nA. red\nB. blue\nPlease select the correct answer from the options above. \n",
        ),
        (
            "mme_realworld",
            ["(A) red", "(B) blue"],
            "Q?\n(A) red\n(B) blue\nSelect the best answer to the above multiple-choice question based on the image. "
            "Respond with only the letter (A, B, C, D, or E) of the correct option.\nThe best answer is:",
        ),
    ],
)
def test_endings_are_written_out(ending, options, expected):
    assert render("vicuna_v1", "Q?", ending=ending, options=options).text == (
        f"{SYSTEM} USER: <image>\n{expected} ASSISTANT:"
    )


def test_endings_and_options_must_fit():
    with pytest.raises(UserError, match="'mcq_letter' needs options"):
        render("vicuna_v1", "Q?", ending="mcq_letter")
    with pytest.raises(UserError, match="'open' lists no options"):
        render("vicuna_v1", "Q?", options=["a"])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_question_is_worded_alone_as_in_its_prompt(ending, template):
    options = ("(A) a bird", "(B) a cat") if ENDINGS[ending].option else ()
    alone = worded("What is it?", ending, options, template)
    whole = render(template, "What is it?", ending=ending, options=options)
    assert alone != "What is it?" or ending in ("open", "logits_match")
    assert render(template, alone, ending="open").text == whole.text


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is it?", "What is it?"),
        ("<image>\nWhat is it? ", "What is it?"),
        ("What is it?\n(A) a bird\n(B) a cat\nAnswer with the letter.", "What is it?"),
        ("What is it?\nA. a bird\nB. a cat", "What is it?"),
        ("What is it?\n A) a bird", "What is it?"),
        ("What is it?\nOptions:\nA. a bird", "What is it?"),
        ("Look closely.\nA bird or a cat?", "Look closely.\nA bird or a cat?"),
        ("Is plan (A) better?", "Is plan (A) better?"),
    ],
)
def test_the_stem_of_a_question_has_no_options_and_no_markers(question, expected):
    assert stem(question) == expected


def test_only_the_last_question_gets_the_ending():
    text = render("vicuna_v1", ["What?", "A cup.", "Why?"], ending="short").text
    assert text.count("single word") == 1 and text.endswith("phrase. ASSISTANT:")


# Tokens.


@pytest.mark.parametrize("name", ["legacy", "first"])
def test_with_llamas_pieces_the_image_of_vicuna_starts_at_35(name):
    tokens = tokens_of(TOKENIZERS[name], render("vicuna_v1", "What is this?"), 576)
    assert tokens.image_spans == ((35, 576),)
    assert (tokens.ids[35 : 35 + 576] == image_id(TOKENIZERS[name])).all()
    assert tokens.ids[0] == 1 and (tokens.ids == 1).sum() == 1


def test_the_image_of_vicrop_starts_right_after_bos(tokenizer):
    tokens = tokens_of(tokenizer, render("vicrop_hf", "What is this?", 2), [4, 6])
    assert tokens.image_spans == ((1, 4), (5, 6))


def test_chunks_are_tokenised_on_their_own(tokenizer):
    """LLaVA's recipe written out: split at the marker, tokenise each chunk, keep the first BOS."""
    prompt = render("vicuna_v1", "What is this?", 2)
    chunks = [tokenizer(chunk, add_special_tokens=False)["input_ids"] for chunk in prompt.text.split("<image>")]
    image = [image_id(tokenizer)] * P
    assert tokens_of(tokenizer, prompt).ids.tolist() == [1, *chunks[0], *image, *chunks[1], *image, *chunks[2]]


def test_a_chunk_after_an_image_has_its_own_prefix_space_unless_joined():
    tokenizer = TOKENIZERS["first"]
    prompt = render("vicuna_v1", "What is this?")
    chunkwise = tokens_of(tokenizer, prompt, 1)
    joined = tokenizer(prompt.text)["input_ids"]
    after = chunkwise.image_spans[0][0] + 1
    assert tokenizer.convert_ids_to_tokens(chunkwise.ids[after : after + 2].tolist()) == ["▁", "<0x0A>"]
    assert tokenizer.convert_ids_to_tokens(joined[after]) == "<0x0A>"


def test_text_after_a_stop_token_has_its_own_prefix_space_as_in_the_slow_tokenizer():
    prompt = render("vicuna_v1", ["What is this?", "A", "What is this?"])
    for name in ("legacy", "first"):
        tokenizer = TOKENIZERS[name]
        ids = tokens_of(tokenizer, prompt).ids.tolist()
        stop = ids.index(tokenizer.eos_token_id)
        assert tokenizer.convert_ids_to_tokens(ids[stop + 1]) == "▁US"


def test_joined_templates_give_the_ids_of_the_hf_processor(tokenizer):
    prompt = render("vicrop_hf", ["What is this?", "A", "What is this?"], 2)
    expected = tokenizer(prompt.text.replace("<image>", "<image>" * P))["input_ids"]
    assert tokens_of(tokenizer, prompt).ids.tolist() == expected


def test_ids_decode_to_the_prompt():
    tokenizer = TOKENIZERS["bytes"]
    tokens = tokens_of(tokenizer, render("vicuna_v1", "Où est l'été ☀?", ending="short"), 1)
    assert tokenizer.decode(tokens.ids[1:]) == tokens.text


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_token_has_a_role_and_the_runs_are_in_order(tokenizer, template):
    tokens = tokens_of(tokenizer, render(template, ["What is this?", "A cup.", "And <this>?"], 2, ending="short"))
    assert [s.start for s in tokens.segments] == [0, *(s.stop for s in tokens.segments[:-1])]
    assert tokens.segments[-1].stop == len(tokens.ids) == tokens.last + 1 == len(tokens.offsets)
    images = [(s.start, s.stop - s.start) for s in tokens.segments if s.role == "image"]
    assert sum(length for _, length in images) == 2 * P
    assert all(tokens.ids[start] == image_id(tokenizer) for start, _ in tokens.image_spans)


def test_roles_cover_the_question_without_template_and_ending(tokenizer):
    tokens = tokens_of(tokenizer, render("vicuna_v1", "What is this?", ending="short"))
    assert [text.strip() for text in segments(tokens, "user")] == ["What is this?"]
    assert [text.strip() for text in segments(tokens, "ending")] == [SHORT_ANSWER]
    assert [text.strip() for text in segments(tokens, "system")] == [SYSTEM]
    assert segments(tokens, "template")[-1].strip() == "ASSISTANT:"


def test_text_before_and_after_an_image_are_two_segments():
    tokens = tokens_of(TOKENIZERS["bytes"], render("vicrop_hf", "Look here <image> and think", ending="open"))
    assert [text.strip() for text in segments(tokens, "user")] == ["Look here", "and think"]
    user = tokens.indices("user")
    start, length = tokens.image_spans[0]
    assert user.min() < start and user.max() >= start + length and not set(user) & set(range(start, start + length))


def test_a_phrase_is_found_in_every_tokenizer(tokenizer):
    tokens = tokens_of(tokenizer, render("vicuna_v1", "What is this user?"))
    span = tokens.span("this")
    assert tokenizer.decode(tokens.ids[span]).strip() == "this"
    first, last = tokens.span("user"), tokens.span("user", occurrence=-1)
    assert first.max() < tokens.image_spans[0][0] < last.min()
    assert np.isin(span, tokens.indices("user")).all()


def test_all_bytes_of_a_character_belong_to_its_phrase():
    tokenizer = TOKENIZERS["bytes"]
    tokens = tokens_of(tokenizer, render("vicuna_v1", "Is ☀ up?"))
    assert tokenizer.decode(tokens.ids[tokens.span("☀")]).strip() == "☀"
    assert len(tokens.span("☀")) >= 3


def test_a_missing_phrase_is_named():
    tokens = tokens_of(TOKENIZERS["bytes"], render("vicuna_v1", "What is this?"))
    for phrase, occurrence in (("dog", 0), ("What", 1), ("", 0)):
        with pytest.raises(UserError, match=f"phrase '{phrase}'"):
            tokens.span(phrase, occurrence)
    with pytest.raises(UserError, match=r"character range 5\.\.5"):
        tokens.span((5, 5))


words = st.text(st.sampled_from("abc  ,?é☀\n"), min_size=1).filter(str.strip)
ANYWHERE = [name for name, template in TEMPLATES.items() if not template.images_outside]


@given(words, words, st.sampled_from(list(TOKENIZERS)), st.sampled_from(ANYWHERE), st.data())
def test_a_character_range_gives_exactly_the_tokens_that_overlap_it(left, right, name, template, data):
    tokenizer = TOKENIZERS[name]
    tokens = tokens_of(tokenizer, render(template, f"{left}<image>{right}", ending="open"))
    start = data.draw(st.integers(0, len(tokens.text) - 1))
    stop = data.draw(st.integers(start + 1, len(tokens.text)))
    expected = [i for i, (a, b) in enumerate(tokens.offsets) if a < b and a < stop and b > start]
    assert tokens.span((start, stop)).tolist() == expected
    # No character of the text but image markers and dropped spaces is without a token.
    covered = np.zeros(len(tokens.text), bool)
    for a, b in tokens.offsets:
        covered[a:b] = True
    at = tokens.text.index("<image>")
    covered[at : at + 7] = True
    assert all(tokens.text[i].isspace() for i in np.flatnonzero(~covered))


def test_images_outside_stand_before_the_first_token_of_the_text_and_nowhere_else():
    tokenizer = TOKENIZERS["bytes"]
    tokens = tokens_of(tokenizer, render("instructblip", "What is this?", num_images=2), [2, 3])
    text = tokenizer("Question: What is this? Short answer:")["input_ids"]
    assert tokens.ids.tolist() == [image_id(tokenizer)] * 5 + text
    assert tokens.image_spans == ((0, 2), (2, 3))
    assert segments(tokens, "user") == ["What is this?"] or segments(tokens, "user") == [" What is this?"]
    with pytest.raises(UserError, match="takes images first"):
        tokens_of(tokenizer, render("instructblip", "What is <image> this?"))


def test_a_tokenizer_may_have_a_marker_of_its_own():
    """Qwen's is longer than ours: characters are counted in the prompt as it is written."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]})
    pad, before, after = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"])
    prompt = render("qwen2_5_vl", "Is this <image> like <image>?", num_images=2)
    tokens = tokenise(tokenizer, prompt, pad, [2, 3])
    (one, _), (two, _) = tokens.image_spans
    for at, count in tokens.image_spans:
        assert tokens.ids[at - 1 : at + count + 1].tolist() == [before, *[pad] * count, after]
    assert [tokens.text[a:b] for a, b in tokens.offsets[tokens.span("like")]][-1].endswith("e")
    assert "".join(tokens.text[a:b] for a, b in tokens.offsets[tokens.span("like")]).strip() == "like"
    assert one < tokens.span("like")[0] < two
    with pytest.raises(UserError, match="contains the image token itself"):
        tokenise(tokenizer, render("qwen2_5_vl", "What is <|image_pad|>?"), pad, 2)


def test_a_tokenizer_without_the_marker_is_refused():
    tokenizer = TOKENIZERS["bytes"]
    with pytest.raises(JaxVQAError, match="finds 0 image tokens"):
        tokenise(tokenizer, render("vicrop_hf", "What?"), len(tokenizer) + 5, P)


def test_counts_and_stray_image_tokens_are_checked():
    tokenizer = TOKENIZERS["bytes"]
    with pytest.raises(UserError, match="has 1 images, token counts are given for 2"):
        tokens_of(tokenizer, render("vicuna_v1", "What?"), [4, 4])
    question_mark = tokenizer.convert_tokens_to_ids("?")
    with pytest.raises(UserError, match="contains the image token itself"):
        tokenise(tokenizer, render("vicuna_v1", "What ?"), question_mark, P)


@pytest.mark.parametrize(
    ("role", "turns", "options"),
    [("assistant", ["What?", "An <image>.", "Why?"], ()), ("ending", "Which?", ("<image>", "red"))],
)
def test_only_questions_may_hold_the_marker(role, turns, options):
    with pytest.raises(UserError, match=f"the {role} text .* contains <image>"):
        render("vicuna_v1", turns, ending="mcq_letter" if options else "open", options=options)


def test_every_ending_of_the_table_is_named_once():
    assert set(ENDINGS) >= {"short", "mcq_letter", "hrbench_letter", "hrbench_official", "mme_realworld", "open"}
