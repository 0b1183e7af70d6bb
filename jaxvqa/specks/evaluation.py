"""Questions about Specks as samples of a run, and how its answers and boxes are judged."""

from collections.abc import Sequence

from jaxvqa.requests import Answer, Sample
from jaxvqa.specks.questions import has_rivals, read_question
from jaxvqa.specks.scenes import scene


def reading_samples(seed: int, count: int) -> list[Sample]:
    """One reading question per scene, about a plate that has rivals of its colour and of its shape."""
    samples = []
    for index in range(count):
        drawn = scene(seed, index)
        question = read_question(next(plate for plate in drawn.plates if has_rivals(plate, drawn.plates)))
        name = f"{seed}/{index}"
        samples.append(Sample((drawn.picture,), question.text, name, box=question.box, answer=question.answer))
    return samples


def right(answer: Answer, sample: Sample) -> bool:
    """Whether the text is the sample's answer, whatever its case and a full stop."""
    return answer.text.strip().rstrip(".").upper() == str(sample.answer).upper()


def covers(box: Sequence[float], target: Sequence[float]) -> bool:
    """Whether a box (xyxy) holds at least half of the target's area."""
    width, height = (max(0, min(box[i + 2], target[i + 2]) - max(box[i], target[i])) for i in (0, 1))
    return 2 * width * height >= (target[2] - target[0]) * (target[3] - target[1])
