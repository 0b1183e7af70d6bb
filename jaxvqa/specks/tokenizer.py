"""The tokenizer of the Specks models: byte-level BPE learned from the methods' prompts and the world's questions."""

from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxvqa.specks.glyphs import CHARACTERS
from jaxvqa.specks.questions import DESCRIBE, SHORT, questions
from jaxvqa.specks.scenes import COLORS, SHAPES, scene

UNK, BOS, EOS, IMAGE = "<unk>", "<s>", "</s>", "<image>"
VOCAB_SIZE = 1024

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
)
STEPWISE = (
    "\n1) Observe the cropped image above and provide a brief description.\n"
    "2) Now observe the original full image below:\n",
    "\nRe-describe the content of the cropped region using the full image for context.\n"
    "3) Based on the information from both images, answer the question:\n",
)
OTHER_PROMPTS = (
    "Based on the cropped image and the full image above, answer the question:\n",
    "According to the question, Detect the answer in the image.",
    "Answer with the option's letter from the given choices directly.\nA. B. C. D.",
    "Answer the option letter directly.",
    "1) The crop shows a 2) It lies in the top middle bottom left center right. 3) Answer: K",
    "Please answer the question based on the original image and local detail image.",
    "This is the main image, and the section enclosed by the red rectangle is the focus region.",
    "This is the zoomed-in view of the focus region.",
    "What colour is the dog's collar? dog with a collar",
    "Is the red bicycle on the left or the right of the blue van? red bicycle and blue van",
    "What is written on the sign above the shop door? sign above the shop door",
    "Is the man with the umbrella in front of or behind the woman with the white hat? woman with the white hat",
    "Which animal is printed on the green flag? green flag",
    "How many boats are in the picture? all boats",
)


def corpus(scenes: int = 400) -> Iterator[str]:
    """Texts to learn from: every prompt of the methods often, and the questions and answers of some scenes."""
    for _ in range(scenes):
        yield from (SYSTEM, "\nUSER: ", SHORT, "ASSISTANT:", *STEPWISE, *OTHER_PROMPTS, *DESCRIBE)
    for index in range(scenes):
        for q in questions(scene(0, index), np.random.default_rng((0, index, 3))):
            yield f"\n{q.text} {q.ending} ASSISTANT: {q.answer}"
    for number in range(100):
        yield from [f".{number:02d}"] * 100
    for word in (*COLORS, *SHAPES, *CHARACTERS, *"0123456789", "10", "11", "12", "Yes", "No", "nothing"):
        yield from [f" {word}"] * 1000


def train_tokenizer(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learn the tokenizer: it adds BOS, decodes what it encoded, and has a token for each two-digit fraction."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNK, BOS, EOS, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer
