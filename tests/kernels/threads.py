"""Calling a kernel from several threads of Python at once."""

import threading

import torch


def differing(function, arguments, expected, calls=20):
    """Return which calls from threads of their own ever gave something else.

    Args:
        function: What each thread calls.
        arguments: Its arguments, thread by thread.
        expected: What it has to return, thread by thread.
        calls: How often each thread calls it.
    """
    wrong = []

    def work(i):
        found = [function(*arguments[i]) for _ in range(calls)]
        wrong.extend(i for output in found if not torch.equal(output, expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong
