"""Requests put to an engine by a test, without a method of its own."""

from jaxvqa.engine import Engine
from jaxvqa.requests import Answer


def collected(engine: Engine, samples, requests) -> list:
    """Results of the requests that `requests(sample)` makes, per sample."""
    results, found = {}, []

    def method(sample):
        results[sample.id] = yield requests(sample)
        return Answer("done")

    for answer in engine.run(samples, method):
        if answer.error is not None:
            raise answer.error
        found.append(results[answer.sample])
    return found
