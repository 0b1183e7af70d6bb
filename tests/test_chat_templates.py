"""A checkpoint's own chat template: the ids of transformers, or the family's template, or an error that says why."""

import json
import re

import pytest
from PIL import Image
from tiny import IMAGE_TOKEN_ID, tiny_llava, write_tokenizer
from tiny_internvl import CHAT_TEMPLATE as INTERNVL
from tiny_internvl import IMAGE_TOKEN_ID as IMG_CONTEXT
from tiny_internvl import write_chat_tokenizer
from tiny_onevision import tiny_onevision
from tiny_qwen import CHAT_TEMPLATE as QWEN
from tiny_qwen import IMAGE_PAD, write_qwen_tokenizer
from tiny_qwen3 import CHAT_TEMPLATE as QWEN3
from transformers import AutoTokenizer

import jaxvqa
from jaxvqa import methods
from jaxvqa.errors import JaxVQAError
from jaxvqa.prompts import TEMPLATES, from_chat_template, render, tokenise
from jaxvqa.requests import Answer

P = 5  # image tokens per image in these tests
QUESTION, REPLY, FURTHER = "What is on the table?", "A cup.", "And under it?"


def turns_of(text, before="", after="", images="<image>\n", first="", last=""):
    """A chat template of one loop: the images of a message, then its text; `before` and `after` may use `role`."""
    return (
        f"{first}{{% for message in messages %}}{{% set role = message.role %}}{before}"
        f"{{% for part in message.content if part.type == 'image' %}}{{{{ {images!r} }}}}{{% endfor %}}"
        f"{{% for part in message.content if part.type == 'text' %}}{text}{{% endfor %}}{after}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{last}{{% endif %}}"
    )


# In words of ours what the published chat templates of LLaVA-NeXT say.
MISTRAL = turns_of(
    "{{ part.text }}",
    "{% if role == 'user' %}[INST] {% else %} {% endif %}",
    "{% if role == 'user' %} [/INST]{% else %}</s> {% endif %}",
)
LLAMA = turns_of(
    "{{ '\n' + part.text }}",
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}",
    "<|eot_id|>",
    "<image>",
    last="{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
)
VICUNA = turns_of("{{ part.text + ' ' }}", "{{ role.upper() + ': ' }}", last="ASSISTANT:")
# And of LLaVA-OneVision.
ONEVISION = turns_of(
    "{{ '\n' + part.text }}",
    "{{ '<|im_start|>' + role + ' ' }}",
    "<|im_end|>",
    "<image>",
    last="{{ '<|im_start|>assistant\n' }}",
)
CUSTOM = QWEN.replace("You are a helpful assistant.", "You look closely, and say little.")
NO_SYSTEM = QWEN3
THINKING = QWEN3.replace(
    "<|im_start|>assistant\n{% endif -%}",
    "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif -%}",
)
ALWAYS_THINKING = QWEN3.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
ONE_BREAK = turns_of(
    "{{ ('\n' if message.content | length > 1 else '') + part.text }}",
    "[{{ role }}]",
    ";",
    "<image>",
    last="[assistant]",
)
OWN_SYSTEM = "{{ bos_token + 'See and say. ' }}" + MISTRAL

NUMBERED = """{% for message in messages %}[{{ message.role }}]{% for part in message.content -%}
{% if part.type == 'image' %}Picture {{ loop.index }}: <image>{% else %}{{ part.text }}{% endif %}{% endfor -%}
{% endfor -%}
{% if add_generation_prompt %}[assistant]{% endif %}"""
TEXT_ONLY = "{% for message in messages %}{{ '[' + message.role + ']' + message.content }}{% endfor %}[assistant]"
BROKEN = {
    "numbered": (NUMBERED, "fixed parts: '.user.Picture 1"),
    "syntax": (MISTRAL + "{% endfor %}", "fails: Encountered unknown tag 'endfor'"),
    "refusing": ("{{ raise_exception('No images, please.') }}", "fails: No images, please"),
    "forgetful": (MISTRAL.replace("in messages", "in messages[-1:]"), "fixed parts"),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Of LLaVA, which begins a text with <s>, of Qwen, which does not, and of InternVL; with their image tokens."""

    def made(name, write, image):
        folder = tmp_path_factory.mktemp(name)
        write(folder)
        return AutoTokenizer.from_pretrained(folder), image

    return {
        "llava": made("llava", write_tokenizer, IMAGE_TOKEN_ID),
        "qwen": made("qwen", write_qwen_tokenizer, IMAGE_PAD),
        "internvl": made("internvl", write_chat_tokenizer, IMG_CONTEXT),
    }


def theirs(tokenizer, chat_template, turns, images, **options):
    """transformers' text of a conversation, the first question with so many images."""
    messages = []
    for number, text in enumerate(turns):
        shown = [dict(type="image")] * (0 if number else images)
        messages.append(dict(role=("user", "assistant")[number % 2], content=[*shown, dict(type="text", text=text)]))
    options = dict(add_generation_prompt=True, enable_thinking=False) | options
    return tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False, **options)


def ids_of(tokenizer, text, image):
    """What transformers' processors make of it: a text that begins with <s> gets no further one."""
    special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    marker = tokenizer.convert_ids_to_tokens(image)
    return tokenizer(text.replace(marker, marker * P), add_special_tokens=special)["input_ids"]


CASES = {
    "mistral": ("llava", MISTRAL, "vicuna_v1"),
    "llama 3": ("llava", LLAMA, "vicuna_v1"),
    "a beginning and a system prompt": ("llava", OWN_SYSTEM, "vicuna_v1"),
    "onevision's on a vicuna": ("llava", ONEVISION, "vicuna_v1"),
    "one break after all images": ("llava", ONE_BREAK, "vicrop_hf"),
    "another system prompt": ("qwen", CUSTOM, "qwen2_5_vl"),
    "no system prompt": ("qwen", NO_SYSTEM, "qwen2_5_vl"),
    "thinking off": ("qwen", THINKING, "qwen3_vl"),
    "always thinking": ("qwen", ALWAYS_THINKING, "qwen3_vl"),
}


@pytest.mark.parametrize("name", CASES)
def test_prompts_have_the_ids_of_transformers(tokenizers, name):
    kind, chat, base = CASES[name]
    tokenizer, image = tokenizers[kind]
    template = from_chat_template(tokenizer, chat, image, TEMPLATES[base])
    assert template not in TEMPLATES.values()
    for turns in ([QUESTION], [QUESTION, REPLY, FURTHER]):
        for images in range(4):
            tokens = tokenise(tokenizer, render(template, turns, images, ending="open"), image, P)
            expected = ids_of(tokenizer, theirs(tokenizer, chat, turns, images), image)
            assert tokens.ids.tolist() == expected
            familys = render(base, turns, images, ending="open")
            assert tokenise(tokenizer, familys, image, P).ids.tolist() != expected
            of_user = "".join(tokens.text[slice(*tokens.offsets[i])] for i in tokens.indices("user"))
            assert of_user.split() == (turns[0] + (turns[2] if turns[2:] else "")).split()


@pytest.mark.parametrize("base", ["qwen2_5_vl", "vicuna_v1"])
def test_endings_and_the_way_of_tokenising_stay_the_familys(tokenizers, base):
    tokenizer, image = tokenizers["llava" if base == "vicuna_v1" else "qwen"]
    chat = MISTRAL if base == "vicuna_v1" else CUSTOM
    template, family = from_chat_template(tokenizer, chat, image, TEMPLATES[base]), TEMPLATES[base]
    for part in ("ending", "ending_break", "joined", "images_outside", "image_open", "image_close"):
        assert getattr(template, part) == getattr(family, part)


def test_the_parts_are_cut_where_turns_begin(tokenizers):
    tokenizer, image = tokenizers["llava"]
    found = from_chat_template(tokenizer, OWN_SYSTEM, image, TEMPLATES["vicuna_v1"])
    assert (found.system, found.user, found.assistant) == ("See and say. ", "[INST] ", " [/INST]")
    assert (found.answer_start, found.answer_open, found.answer_end) == (" ", "", "</s> ")
    tokenizer, image = tokenizers["qwen"]
    found = from_chat_template(tokenizer, CUSTOM, image, TEMPLATES["qwen3_vl"])
    assert found.system == "<|im_start|>system\nYou look closely, and say little.<|im_end|>\n"
    assert (found.user, found.answer_end) == ("<|im_start|>user\n", "<|im_end|>\n")


def test_an_empty_thinking_block_opens_the_answer_that_is_asked_for_and_no_past_one(tokenizers):
    tokenizer, image = tokenizers["qwen"]
    template = from_chat_template(tokenizer, THINKING, image, TEMPLATES["qwen3_vl"])
    text = render(template, [QUESTION, REPLY, FURTHER]).text
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") and text.count("<think>") == 1
    assert text != theirs(tokenizer, THINKING, [QUESTION, REPLY, FURTHER], 1, enable_thinking=True)


@pytest.mark.parametrize(
    ("base", "kind", "chat"),
    [
        ("qwen2_5_vl", "qwen", QWEN),
        ("qwen3_vl", "qwen", QWEN3),
        ("internvl", "internvl", INTERNVL),  # whose processor writes what stands around an image
        # These leave the system prompt to the caller; the checkpoints were trained with one.
        ("vicuna_v1", "llava", VICUNA),
        ("qwen_1_5", "llava", ONEVISION),
    ],
)
def test_the_published_chat_templates_keep_the_familys(tokenizers, base, kind, chat):
    tokenizer, image = tokenizers[kind]
    assert from_chat_template(tokenizer, chat, image, TEMPLATES[base]) is TEMPLATES[base]


@pytest.mark.parametrize("chat", [TEXT_ONLY, "{{ messages[0].content }}", "{{ messages[0].content.strip() }}"])
def test_a_chat_template_without_images_says_nothing(tokenizers, chat):
    tokenizer, image = tokenizers["llava"]
    assert from_chat_template(tokenizer, chat, image, TEMPLATES["vicuna_v1"]) is None


@pytest.mark.parametrize("name", BROKEN)
def test_a_chat_template_that_cannot_be_followed_is_an_error(tokenizers, name):
    tokenizer, image = tokenizers["llava"]
    chat, match = BROKEN[name]
    with pytest.raises(JaxVQAError, match=match):
        from_chat_template(tokenizer, chat, image, TEMPLATES["vicuna_v1"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    options = dict(text_model="mistral", text_layers=2, vision_layers=2, image_size=28)
    return tiny_onevision(tmp_path_factory.mktemp("next"), is_next=True, **options)


@pytest.fixture
def with_chat(folder):
    """with_chat(content): the folder, with a chat template as the processors of transformers 4 keep it."""
    file = folder / "chat_template.json"

    def write(chat):
        file.write_text(json.dumps(dict(chat_template=chat)))
        return folder

    yield write
    file.unlink(missing_ok=True)


def test_a_folder_without_chat_template_speaks_as_its_family(folder):
    vlm = jaxvqa.load(folder)
    assert vlm.template is TEMPLATES["vicuna_v1"] and vlm.facts.template == "vicuna_v1"


def test_a_loaded_model_is_asked_in_the_chat_template_of_its_processor(with_chat):
    from transformers import LlavaNextProcessor

    vlm = jaxvqa.load(with_chat(MISTRAL))
    processor = LlavaNextProcessor(
        vlm.image_processor, vlm.tokenizer, patch_size=7, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=MISTRAL,
    )  # fmt: skip
    image = Image.new("RGB", (60, 40), (200, 30, 60))
    messages = [dict(role="user", content=[dict(type="image"), dict(type="text", text=QUESTION)])]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == f"[INST] <image>\n{QUESTION} [/INST]"
    expected = processor(text=[text], images=[[image]], return_tensors="np")["input_ids"][0]
    assert vlm.encode(image, QUESTION).tokens.ids.tolist() == expected.tolist()
    for name in ("vanilla", "vicrop", "hiperson"):
        bound = methods.bind(methods.get(name)(), vlm.facts)
        assert bound.template is vlm.template
        record = Answer("A cup.", options=methods.method_options(bound)).record()
        assert "user='[INST] '" in json.loads(json.dumps(record))["options"]["template"]


def test_a_given_template_comes_before_the_chat_template(with_chat):
    folder = with_chat(NUMBERED)
    assert jaxvqa.load(folder, template="llava_v1").facts.template == "llava_v1"
    said = rf"{re.escape(str(folder))}: .* fixed parts: .*; give load template= .--chat-template.: one of vicuna_v1, "
    with pytest.raises(JaxVQAError, match=said):
        jaxvqa.load(folder)


def test_a_language_models_chat_template_is_left_alone_and_said(with_chat):
    with pytest.warns(UserWarning, match="shows no images; it is asked in the template 'vicuna_v1'"):
        assert jaxvqa.load(with_chat(TEXT_ONLY)).template is TEMPLATES["vicuna_v1"]


@pytest.mark.parametrize(("setup", "template"), [("pad", "vicuna_v1"), ("hf", "vicrop_hf")])
def test_llava_1_5_speaks_as_in_the_papers(tmp_path, setup, template):
    folder = tiny_llava(tmp_path, text_layers=2, vision_layers=3)
    (folder / "chat_template.json").write_text(json.dumps(dict(chat_template=MISTRAL)))
    assert jaxvqa.load(folder, image_setup=setup).facts.template == template
