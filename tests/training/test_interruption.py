"""Signals as requests."""

import os
import signal
import threading

import pytest
import torch

from diffkd.training.checkpointing import StopRequest

CPU = torch.device("cpu")


@pytest.fixture
def stop():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for its background jobs
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    request = StopRequest()
    yield request
    request.stop_listening()
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted(stop, number):
    stop.listen()
    assert stop.agreed(CPU) == 0
    os.kill(os.getpid(), number)
    assert stop.agreed(CPU) == number


def test_a_second_one_kills(stop):
    stop.listen()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_and_its_echo_are_one_request(stop):
    stop.listen()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.agreed(CPU) == signal.SIGINT


def test_other_threads_do_not_listen(stop):
    thread = threading.Thread(target=stop.listen)
    thread.start()
    thread.join()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
