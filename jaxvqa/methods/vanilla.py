"""The unmodified model: the question about the image as it is, answered once."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxvqa.methods import Facts, fill
from jaxvqa.prompts import ENDINGS, Template, render
from jaxvqa.requests import Answer, Generate, Sample

SHORT = "short"


@dataclass(frozen=True)
class Vanilla:
    """The unmodified model: one answer from the image as it is."""

    name: ClassVar[str] = "vanilla"

    template: str | Template | None = None
    """Prompt template, or its name; None is the model's own."""
    ending: str | None = None
    """What follows the question (`prompts.ENDINGS`); None is "short", and nothing ("open") on InstructBLIP, whose
    template asks for a short answer."""
    max_new_tokens: int = 64
    """Tokens that the answer may have."""

    def bind(self, facts: Facts, preset: dict[str, Any]) -> "Vanilla":
        return fill(fill(self, **preset), template=facts.template, ending=SHORT)

    def __call__(self, sample: Sample) -> Generator[Any, Any, Answer]:
        assert self.template is not None, "bound"
        ending = self.ending or SHORT
        listed = ending in ENDINGS and ENDINGS[ending].option
        prompt = render(
            self.template,
            sample.question,
            num_images=len(sample.images),
            ending=ending,
            options=sample.options if listed else (),
        )
        reply = yield Generate(sample.images, prompt, max_new_tokens=self.max_new_tokens)
        return Answer(reply.text)
