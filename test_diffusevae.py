"""The second half of the teaching: every test states a property, checked against something else.

    python -m pytest                                            # test diffusevae.py
    python test_diffusevae.py exercise -o student.py            # write a file for a student
    python test_diffusevae.py grade student.py                  # grade it: a line an exercise
    DIFFUSEVAE=student.py python -m pytest test_diffusevae.py   # the same, with all tracebacks
    python test_diffusevae.py bench                             # measure speed, project costs

The grader comes first, then the exercises, the grader's own tests, all the rest in the order of
diffusevae.py, where a test that needs an unsolved exercise is skipped, and the lecturer's commands.
No network, no GPU; the data files are made on the spot.
"""

import ast
import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import io
import itertools
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import timeit
import tokenize
import types
import urllib.request
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal
from torch.distributions import kl_divergence as kl_of_torch
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
GRADED = Path(os.environ.get('DIFFUSEVAE') or HERE / 'diffusevae.py').resolve()

torch.set_num_threads(2)
T = 1000
CODE_LINES = 1220
BETA = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
ALPHA_BAR = torch.cumprod(1 - BETA, 0)


def randn(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers, the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tensor(*values):
    """The values as float64; a single list gets a batch axis in front."""
    return torch.tensor(values, dtype=torch.float64)


# ==== THE GRADER: a class of tests an exercise, with a time limit, the others replaced ============

EXERCISES = {}  # name: its class of tests, in the order of diffusevae.py
FAILED = {}  # name: why, of the exercises of the graded file that are not right
NOT_SOLVED = 'not solved yet'
CHANGED = 'changes one of its arguments.'
GRADE_LIMIT = 900  # seconds for a whole file, should it hang where no test can be stopped
TIME_LIMIT = 60  # seconds a test; a quarter of it for an exercise's own, which take under one


def exercise(name, points):
    """Makes a class the tests of the exercise `name`. The class has a docstring if its formula can
    be derived: what a student's copy asks in place of the comment."""

    def register(cls):
        cls.exercise = name
        cls.points = points
        cls.number = len(EXERCISES) + 1
        cls.solution = staticmethod(getattr(dv, name, None))  # of the graded file
        EXERCISES[name] = cls
        return cls

    return register


class Own:
    """The tests' own formulas, written differently from diffusevae.py: a name for them, no more."""

    def reparameterize(mu, logvar, eps):
        return mu + logvar.exp().sqrt() * eps

    def kl_divergence(mu, logvar):
        terms = -logvar / 2 + (mu * mu + logvar.exp()) / 2 - 0.5
        return terms.sum(-1)

    def negative_elbo(y, x_hat, mu, logvar, kl_weight=1.0):
        error = ((x_hat - y) ** 2).sum() / len(y)
        kl = Own.kl_divergence(mu, logvar).sum() / len(mu)
        return kl_weight * kl + error, error, kl

    def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
        alpha_bar = []
        product = 1.0
        for t in range(T):
            product *= 1 - (beta_1 + t * (beta_T - beta_1) / max(1, T - 1))
            alpha_bar.append(product)
        return torch.tensor(alpha_bar, dtype=torch.float64)

    def q_sample(x_0, alpha_bar, eps):
        return eps * (1 - alpha_bar) ** 0.5 + x_0 * alpha_bar**0.5

    def predict_x0(x_t, alpha_bar, eps):
        root = alpha_bar**0.5
        noise = (1 - alpha_bar) ** 0.5 * eps
        x_0 = (x_t - noise) / root
        return x_0

    def q_posterior(x_0, x_t, alpha_bar, alpha_bar_prev):
        alpha = alpha_bar / alpha_bar_prev
        mean = alpha_bar_prev**0.5 * (1 - alpha) * x_0 + alpha**0.5 * (1 - alpha_bar_prev) * x_t
        variance = (1 - alpha) * (1 - alpha_bar_prev)
        mean = mean / (1 - alpha_bar)
        variance = variance / (1 - alpha_bar)
        return mean, variance

    def ddpm_step(x_t, x_0_pred, alpha_bar, alpha_bar_prev, noise, variance='small'):
        mean, tilde_beta = Own.q_posterior(x_0_pred, x_t, alpha_bar, alpha_bar_prev)
        beta = 1 - alpha_bar / alpha_bar_prev
        std = (beta if variance == 'large' else tilde_beta) ** 0.5
        return mean + (alpha_bar_prev < 1) * std * noise

    def ddim_step(x_t, x_0_pred, alpha_bar, alpha_bar_prev, noise, eta=0.0):
        beta = 1 - alpha_bar / alpha_bar_prev
        sigma = eta * (beta * (1 - alpha_bar_prev) / (1 - alpha_bar)) ** 0.5
        eps = (x_t - alpha_bar**0.5 * x_0_pred) / (1 - alpha_bar) ** 0.5
        mean = alpha_bar_prev**0.5 * x_0_pred + (1 - alpha_bar_prev - sigma**2) ** 0.5 * eps
        return mean + sigma * noise

    def ddpm_loss(eps_theta, x_0, alpha_bar, t, eps):
        noisy = [Own.q_sample(x, alpha_bar[i], e) for x, i, e in zip(x_0, t, eps)]
        error = eps_theta(torch.stack(noisy), t) - eps
        return (error**2).mean()

    def time_embedding(t, width):
        if t.is_meta:
            return torch.empty(len(t), width, device='meta')
        half = width // 2
        rows = []
        for value in t.tolist():
            angles = [value * 10_000 ** (-i / half) for i in range(half)]
            cosines = [math.cos(a) for a in angles]
            sines = [math.sin(a) for a in angles]
            rows.append(cosines + sines)
        return torch.tensor(rows)

    def network_input(x_t, x_hat, form):
        first = {'1': x_t, '2': x_hat + x_t}[form]
        return torch.cat((first, x_hat), 1)

    def ema_update(averages, parameters, step, decay):
        d = (1 + step) / (10 + step)
        if d > decay:
            d = decay
        with torch.no_grad():
            for average, parameter in zip(averages, parameters):
                average.copy_(d * average + (1 - d) * parameter)

    def em_step(z, r, ridge=1e-6):
        N, D = z.shape
        N_k = r.sum(0)
        share = r / N_k
        m = share.T @ z
        d = z[:, None] - m  # [N, K, D]
        S = torch.einsum('nk,nki,nkj->kij', share, d, d)
        S = S + ridge * torch.eye(D, dtype=z.dtype)
        distance = torch.einsum('nki,kij,nkj->nk', d, S.inverse(), d)
        log_p = -0.5 * (distance + S.logdet() + D * math.log(2 * math.pi))
        joint = (N_k / N).log() + log_p  # log p(k, z)
        return (N_k / N, m, S), joint.softmax(1), joint.logsumexp(1).mean()

    def slerp(a, b, w):
        cosine = (a * b).sum() / (a.norm() * b.norm())
        theta = cosine.clamp(-0.9999, 0.9999).acos()
        weight_a = torch.sin((1 - w) * theta) / theta.sin()
        weight_b = torch.sin(w * theta) / theta.sin()
        return weight_a * a + weight_b * b


@contextlib.contextmanager
def replaced(functions):
    """The graded module with some of its functions replaced."""
    before = {name: getattr(dv, name, None) for name in functions}
    vars(dv).update(functions)
    try:
        yield
    finally:
        vars(dv).update(before)


def guarded(name, solution):
    """A solution that fails if it changes an argument, which is then put right again: a later step
    needs it. (`ema_update` is to change its first.)"""

    def call(*given, **named):
        tensors = [t for t in flat(given[name == 'ema_update' :]) if not t.is_meta]
        before = [t.detach().clone() for t in tensors]
        answer = solution(*given, **named)
        changed = [pair for pair in zip(tensors, before) if not torch.equal(*pair)]
        with torch.no_grad():
            for t, right in changed:
                t.resize_(right.shape).copy_(right)
        assert not changed, CHANGED
        return answer

    return call


def others(name):
    """The own formulas of all exercises but one."""
    return {other: getattr(Own, other) for other in EXERCISES if other != name}


def unsolved():
    """For the tests of part 3: what stands for the exercises that failed; it skips the test."""

    def skip(name, *args, **more):
        pytest.skip(f'needs exercise {EXERCISES[name].number}, {name}')

    return {name: partial(skip, name) for name in FAILED}


def skip_unless_all_are_solved():
    """For tests that run the graded file as it is, where no function can be replaced."""
    for name in FAILED:
        pytest.skip(f'needs exercise {EXERCISES[name].number}, {name}')


class TimeLimit(BaseException):
    """Not an Exception: a solution must not catch it by accident."""


@contextlib.contextmanager
def time_limit(seconds):
    """Raises TimeLimit in what takes longer (not on Windows, which has no such timer)."""
    if not hasattr(signal, 'setitimer'):
        yield
        return

    def stop(*args):
        raise TimeLimit(f'took longer than {seconds} seconds')

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again every second, should one be caught
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def load_module(path, name='diffusevae'):
    """The module in a file, wherever it is and whatever it is called."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


try:
    with time_limit(TIME_LIMIT):
        dv = load_module(GRADED)
except (Exception, SystemExit, TimeLimit) as error:
    if __name__ == '__main__':
        print(f'error: {GRADED} cannot be imported: {error!r}', file=sys.stderr)
        sys.exit(2)
    pytest.exit(f'{GRADED} cannot be imported: {error!r}', returncode=2)


def properties(name):
    """The tests of an exercise."""
    return [test for test in vars(EXERCISES[name]).values() if inspect.isfunction(test)]


def property_of(test):
    """The first paragraph of a test's docstring: what it says of a correct solution."""
    return ' '.join(inspect.getdoc(test).split('\n\n')[0].split())


def grade(name, solution, seconds=TIME_LIMIT):
    """The properties of an exercise that a solution violates: its own tests, here and now."""
    violated = []
    for test in properties(name):
        try:
            functions = others(name) | {name: guarded(name, solution)}
            with replaced(functions), time_limit(seconds):
                test(EXERCISES[name]())
        except (Exception, TimeLimit):
            violated.append(property_of(test))
    return violated


# ---- pytest's hooks ------------------------------------------------------------------------------
#      This file is its own plugin: the hooks below hold once it is registered, which
#      pytest_generate_tests, the one hook that pytest looks for in any test module, does.


def pytest_generate_tests(metafunc):
    plugins = metafunc.config.pluginmanager
    if not plugins.is_registered(sys.modules[__name__]):
        plugins.register(sys.modules[__name__])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """Fixtures train small models, so that they, too, may need exercises and time."""
    with replaced(unsolved()), time_limit(TIME_LIMIT):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """An exercise is tested with the own formulas of all others, part 3 with the graded file's."""
    name = getattr(item.cls, 'exercise', None)
    if FAILED.get(name) == NOT_SOLVED:
        pytest.skip(NOT_SOLVED)  # it is said once
    if name:
        functions = others(name) | {name: guarded(name, EXERCISES[name].solution)}
        seconds = TIME_LIMIT / 4
    else:
        functions = unsolved()
        seconds = TIME_LIMIT

    with replaced(functions), time_limit(seconds):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """The failure of an exercise starts with the property that does not hold. One that is still
    blank has no traceback."""
    report = yield
    name = getattr(item.cls, 'exercise', None)
    if name and report.failed:
        why = f'does not hold: {property_of(item.function)}'
        report.longrepr = f'{why}\n\n{report.longreprtext}'
        if call.excinfo.errisinstance(NotImplementedError):
            why = NOT_SOLVED
            report.longrepr = f'Exercise {EXERCISES[name].number}, {name}: {NOT_SOLVED}'
        elif CHANGED in str(call.excinfo.value):
            why = CHANGED
        elif not call.excinfo.errisinstance(AssertionError):
            said = f'{call.excinfo.typename}: {call.excinfo.value}'.splitlines()[0].rstrip(': ')
            own = [line for line in call.excinfo.traceback if Path(line.path) == GRADED]
            where = f', line {own[-1].lineno + 1}: {str(own[-1].statement).strip()}' if own else ''
            why = f'stops with {said}{where} (in a test of: {property_of(item.function)})'
        FAILED.setdefault(name, why)
    return report


def pytest_terminal_summary(terminalreporter):
    """A line an exercise, and the points: for those whose every test ran and passed."""
    passed = [report.nodeid for report in terminalreporter.stats.get('passed', [])]
    if not FAILED and not any('::Test' in nodeid for nodeid in passed):
        return

    earned = 0
    for name, cls in EXERCISES.items():
        done = sum(f'::{cls.__name__}::' in nodeid for nodeid in passed)
        points = cls.points if done == len(properties(name)) else 0
        earned += points

        why = ''
        if name in FAILED:
            why = f'  {general_mistake(name, cls.solution) or FAILED[name]}'
            mistake = looks_like(name, cls.solution)
            if mistake is not None:
                why += f' This looks like: {mistake}.'
        elif not points:
            why = '  not all of its tests were run'
        line = f'exercise {cls.number:2} {name:16} {points} of {cls.points}{why}'
        terminalreporter.write_line(line)

    possible = sum(cls.points for cls in EXERCISES.values())
    terminalreporter.write_line(f'{GRADED.name}: {earned} of {possible} points')


# ==== PART 1. THE EXERCISES =======================================================================


@exercise('reparameterize', points=1)
class TestReparameterize:
    def test_by_hand(self):
        """mu = 1, sigma^2 = 4, eps = 0.5 make z = 2; mu = -3, sigma^2 = 1, eps = 2 make z = -1."""
        mu = tensor([1, -3])
        logvar = tensor([math.log(4), 0])
        eps = tensor([0.5, 2])
        assert torch.allclose(dv.reparameterize(mu, logvar, eps), tensor([2, -1]))

    def test_gradient(self):
        """dz/dmu = 1 and dz/dlogvar = sigma eps / 2: the sample is differentiable in both."""
        mu, logvar, eps = randn(3, 2, 3)
        mu.requires_grad_()
        logvar.requires_grad_()
        dv.reparameterize(mu, logvar, eps).sum().backward()
        assert torch.allclose(mu.grad, torch.ones(2, 3, dtype=mu.dtype))
        assert torch.allclose(logvar.grad, 0.5 * logvar.detach().exp().sqrt() * eps)


@exercise('kl_divergence', points=3)
class TestKLDivergence:
    """For each z_j, log N(z; m, v) = -(z - m)^2 / (2 v) - log(2 pi v) / 2. What is left of the
    logarithms of both Gaussians, subtracted and averaged over q?"""

    def test_monte_carlo(self):
        """The KL is the mean of log q(z) - log p(z) over z ~ q."""
        mu = randn(3, 5, seed=1)
        logvar = randn(3, 5, seed=2)
        q = Normal(mu, (logvar / 2).exp())
        p = Normal(0.0, 1.0)
        z = mu + (logvar / 2).exp() * randn(50_000, 3, 5, seed=3)
        estimate = (q.log_prob(z) - p.log_prob(z)).sum(2).mean(0)
        assert torch.allclose(dv.kl_divergence(mu, logvar), estimate, rtol=0.03)

    def test_against_torch(self):
        """It agrees with torch.distributions, for as many examples as dimensions, too."""
        for shape in ((3, 5), (4, 4), (1, 7)):
            mu, logvar = randn(2, *shape)
            theirs = kl_of_torch(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(1)
            assert torch.allclose(dv.kl_divergence(mu, logvar), theirs)

    def test_zero_for_the_prior(self):
        """KL( N(0, I) || N(0, I) ) = 0 for each example, and it is never negative."""
        kl = dv.kl_divergence(torch.zeros(6, 2), torch.zeros(6, 2))
        assert kl.shape == (6,) and torch.equal(kl, torch.zeros(6))
        assert (dv.kl_divergence(*randn(2, 100, 3)) > 0).all()

    def test_gradient(self):
        """dKL/dmu = mu and dKL/dlogvar = (sigma^2 - 1) / 2."""
        mu, logvar = randn(2, 4, 3)
        mu.requires_grad_()
        logvar.requires_grad_()
        dv.kl_divergence(mu, logvar).sum().backward()
        assert torch.allclose(mu.grad, mu.detach())
        assert torch.allclose(logvar.grad, (logvar.detach().exp() - 1) / 2)


@exercise('negative_elbo', points=2)
class TestNegativeELBO:
    """A decoder N(x_hat, sigma_y^2 I) has -log p(y|z) = ||y - x_hat||^2 / (2 sigma_y^2) + constant.
    Which loss is kl_weight times the negative bound of an image, but for a constant, if kl_weight
    is 2 sigma_y^2?"""

    def test_gaussian_decoder(self):
        """Up to a constant, the loss is kl_weight times the negative ELBO of a decoder with
        variance kl_weight / 2."""
        x, x_hat = randn(2, 4, 3, 5, 5, seed=1).sigmoid()
        mu, logvar = randn(2, 4, 6, seed=2)
        for kl_weight in (1.0, 0.1, 3.0):
            loss = dv.negative_elbo(x, x_hat, mu, logvar, kl_weight)[0]
            sigma = (kl_weight / 2) ** 0.5
            log_p = Normal(x_hat, sigma).log_prob(x) - Normal(0.0, sigma).log_prob(tensor(0.0))
            kl = kl_of_torch(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0))
            bound = [kl_weight * (kl[i].sum() - log_p[i].sum()) for i in range(4)]
            assert torch.allclose(loss, sum(bound) / 4)

    def test_parts(self):
        """The parts are the squared error and the unweighted KL: sums over dimensions, means over
        the batch; loss = squared error + kl_weight KL, kl_weight = 1 by default."""
        x = torch.ones(3, 3, 2, 2)
        x_hat = torch.full((3, 3, 2, 2), 0.5)
        mu = torch.full((3, 4), 2.0)  # KL: 4 * 2^2 / 2
        logvar = torch.zeros(3, 4)
        for given, kl_weight in (((), 1.0), ((0.5,), 0.5)):
            loss, error, kl = dv.negative_elbo(x, x_hat, mu, logvar, *given)
            assert error.item() == 12 * 0.25 and kl.item() == 8
            assert loss.item() == 3 + kl_weight * 8

    def test_gradient(self):
        """Gradients reach x_hat, mu and logvar: 2 (x_hat - x) / B, and kl_weight times the KL's."""
        x, x_hat = randn(2, 5, 1, 2, 2)
        mu, logvar = randn(2, 5, 3, seed=1)
        for leaf in (x_hat, mu, logvar):
            leaf.requires_grad_()
        dv.negative_elbo(x, x_hat, mu, logvar, 0.3)[0].backward()
        assert torch.allclose(x_hat.grad, 2 * (x_hat.detach() - x) / 5)
        assert torch.allclose(mu.grad, 0.3 * mu.detach() / 5)
        assert torch.allclose(logvar.grad, 0.3 * (logvar.detach().exp() - 1) / 2 / 5)


@exercise('linear_schedule', points=1)
class TestLinearSchedule:
    def test_by_hand(self):
        """beta = 0.1, 0.2, 0.3 give alpha_bar = 0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7, in float64."""
        alpha_bar = dv.linear_schedule(3, 0.1, 0.3)
        assert alpha_bar.shape == (3,) and alpha_bar.dtype == torch.float64
        assert torch.allclose(alpha_bar, tensor(0.9, 0.72, 0.504), rtol=1e-6)

    def test_default(self):
        """By default there are 1,000 steps: the first leaves 1 - 1e-4 of the signal's power, the
        last 4e-5, all in float64."""
        alpha_bar = dv.linear_schedule()
        assert alpha_bar.shape == (1000,) and abs(alpha_bar[-1] - 4.04e-5) < 1e-7
        assert abs(1 - alpha_bar[0] - 1e-4) < 1e-12  # in float32 it would have three digits


@exercise('q_sample', points=1)
class TestQSample:
    """A step is x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise. The sum of two independent
    Gaussians is one, and their variances add up. Which x_t do all steps up to t make of x_0 and a
    single eps? What are their factors? (Guess from two steps, then prove it for t from t - 1.)"""

    def test_step_by_step(self):
        """Mean and variance are those after 300 steps y <- sqrt(1 - beta) y + sqrt(beta) noise."""
        x_0 = 0.8
        t = 299
        generator = torch.Generator().manual_seed(0)
        y = torch.full((10_000,), x_0, dtype=torch.float64)
        for beta in BETA[: t + 1]:
            noise = torch.randn(10_000, generator=generator)
            y = (1 - beta) ** 0.5 * y + beta**0.5 * noise
        at_once = dv.q_sample(torch.full_like(y, x_0), ALPHA_BAR[t], randn(10_000))
        assert abs(at_once.mean() - y.mean()) < 0.03
        assert abs(at_once.var() / y.var() - 1) < 0.05

    def test_each_image_at_its_own_time(self):
        """alpha_bar [B, 1, 1, 1] noises each image by its own, with B = C = H = W, too."""
        x_0, eps = randn(2, 3, 3, 3, 3)
        alpha_bar = tensor(0.04, 0.36, 0.64).view(3, 1, 1, 1)
        x_t = dv.q_sample(x_0, alpha_bar, eps)
        for i, (of_image, of_noise) in enumerate([(0.2, 0.96**0.5), (0.6, 0.8), (0.8, 0.6)]):
            assert torch.allclose(x_t[i], of_image * x_0[i] + of_noise * eps[i])


@exercise('predict_x0', points=1)
class TestPredictX0:
    """Solve `q_sample` for the image."""

    def test_inverts(self):
        """x_0 is the image that noised by eps makes x_t, whatever its range."""
        x_0 = 3 * randn(4, 5, seed=1)
        eps = randn(4, 5, seed=2)
        for t in (0, 10, 500, 999):
            x_t = Own.q_sample(x_0, ALPHA_BAR[t], eps)
            assert torch.allclose(dv.predict_x0(x_t, ALPHA_BAR[t], eps), x_0)

    def test_each_image_at_its_own_time(self):
        """alpha_bar may be [B, 1, 1, 1], each image's own."""
        x_0, eps = randn(2, 3, 3, 3, 3)
        alpha_bar = tensor(0.04, 0.36, 0.64).view(3, 1, 1, 1)
        x_t = Own.q_sample(x_0, alpha_bar, eps)
        assert torch.allclose(dv.predict_x0(x_t, alpha_bar, eps), x_0)


@exercise('q_posterior', points=4)
class TestQPosterior:
    """Multiply the two Gaussians in x_prev, q(x_t|x_prev) and q(x_prev|x_0), which are known, and
    complete the square. Why does the first not need x_0? What is beta, the variance that is added
    between the two times? Does your formula hold where alpha_bar_prev is 1?"""

    def test_bayes_rule(self):
        """q(x_prev|x_t, x_0) is q(x_t|x_prev) q(x_prev|x_0), normalised: by numerical integration
        over x_prev, for neighbours and for coarse grids."""
        x_0 = tensor(3.0)  # outside [-1, 1]: no clip belongs here
        x_t = tensor(-4.0)
        for t, t_prev in ((1, 0), (700, 699), (999, 998), (900, 400), (5, 0)):
            alpha_bar, alpha_bar_prev = ALPHA_BAR[t], ALPHA_BAR[t_prev]
            mean, variance = dv.q_posterior(x_0, x_t, alpha_bar, alpha_bar_prev)
            y = mean + variance.sqrt() * torch.linspace(-9, 9, 20_001, dtype=torch.float64)
            alpha = torch.prod(1 - BETA[t_prev + 1 : t + 1])
            likelihood = Normal(alpha.sqrt() * y, (1 - alpha).sqrt())
            prior = Normal(alpha_bar_prev.sqrt() * x_0, (1 - alpha_bar_prev).sqrt())
            density = (likelihood.log_prob(x_t) + prior.log_prob(y)).softmax(0)
            assert abs((density * y).sum() - mean) < 1e-6
            assert abs((density * (y - mean) ** 2).sum() / variance - 1) < 1e-6

    def test_each_image_at_its_own_time(self):
        """alpha_bar and alpha_bar_prev may be [B, 1, 1, 1], each image's own."""
        x_0, x_t = randn(2, 3, 3, 3, 3)
        alpha_bar = tensor(0.1, 0.3, 0.5).view(3, 1, 1, 1)
        alpha_bar_prev = tensor(0.4, 0.9, 0.6).view(3, 1, 1, 1)
        mean, variance = dv.q_posterior(x_0, x_t, alpha_bar, alpha_bar_prev)
        for i in range(3):
            one = Own.q_posterior(x_0[i], x_t[i], alpha_bar[i].item(), alpha_bar_prev[i].item())
            assert torch.allclose(mean[i], one[0]) and torch.allclose(variance[i], tensor(one[1]))

    def test_last_step(self):
        """At the end (alpha_bar_prev = 1) it is exactly x_0: mean x_0, variance 0."""
        mean, variance = dv.q_posterior(tensor(0.3), tensor(9.0), ALPHA_BAR[0].item(), 1.0)
        assert torch.allclose(mean, tensor(0.3)) and variance == 0


# Times of steps, and their alpha_bar and alpha_bar_prev, between neighbours and on coarser grids.
PAIRS = torch.tensor([(999, 998), (999, 300), (40, 3), (1, 0)])
STEPS = ALPHA_BAR[PAIRS].tolist()
# Whole chains: steps, spacing, and how far off a standard deviation may be.
GRIDS = [(1000, 'uniform', 0.05), (250, 'uniform', 0.12), (250, 'quadratic', 0.12)]


@exercise('ddpm_step', points=2)
class TestDDPMStep:
    def test_small(self):
        """With the "small" variance, the default: the posterior's mean plus its standard deviation
        times the noise."""
        x_t, x_0, noise = randn(3, 50)
        for alpha_bar, alpha_bar_prev in STEPS:
            mean, variance = Own.q_posterior(x_0, x_t, alpha_bar, alpha_bar_prev)
            for given in ((), ('small',)):
                step = dv.ddpm_step(x_t, x_0, alpha_bar, alpha_bar_prev, noise, *given)
                assert torch.allclose(step, mean + variance**0.5 * noise)

    def test_large(self):
        """With the "large" variance: the same mean, and beta of the two grid points."""
        x_t, x_0, noise = randn(3, 50)
        for (alpha_bar, alpha_bar_prev), (t, t_prev) in zip(STEPS, PAIRS):
            beta = 1 - torch.prod(1 - BETA[t_prev + 1 : t + 1])
            mean = dv.ddpm_step(x_t, x_0, alpha_bar, alpha_bar_prev, 0 * noise, 'large')
            assert torch.allclose(mean, Own.q_posterior(x_0, x_t, alpha_bar, alpha_bar_prev)[0])
            step = dv.ddpm_step(x_t, x_0, alpha_bar, alpha_bar_prev, noise, 'large')
            assert torch.allclose(step, mean + beta**0.5 * noise)

    def test_last_step(self):
        """The last step (alpha_bar_prev = 1) adds no noise, whichever the variance: it is x_0."""
        x_t, x_0, noise = randn(3, 50)
        for variance in ('large', 'small'):
            step = dv.ddpm_step(x_t, x_0, ALPHA_BAR[30].item(), 1.0, 1e3 * noise, variance)
            assert torch.allclose(step, x_0)


@exercise('ddim_step', points=3)
class TestDDIMStep:
    """x_prev = sqrt(alpha_bar_prev) x_0_pred + (what?) eps + sigma noise, where eps is what x_t and
    x_0_pred imply, and sigma is eta times the standard deviation of the posterior. Which factor of
    eps makes x_prev as noisy as q(x_prev|x_0), for every eta?"""

    def test_deterministic(self):
        """For eta = 0, the default: the same x_0 and eps, noised to the next time."""
        x_0, eps, noise = 3 * randn(3, 50)
        for alpha_bar, alpha_bar_prev in STEPS:
            x_t = Own.q_sample(x_0, alpha_bar, eps)
            step = dv.ddim_step(x_t, x_0, alpha_bar, alpha_bar_prev, noise)
            assert torch.allclose(step, Own.q_sample(x_0, alpha_bar_prev, eps))

    def test_eta_1(self):
        """For eta = 1: the ancestral step with the "small" variance, on every grid."""
        x_t, x_0, noise = randn(3, 50)
        for alpha_bar, alpha_bar_prev in STEPS:
            ancestral = Own.ddpm_step(x_t, x_0, alpha_bar, alpha_bar_prev, noise, 'small')
            step = dv.ddim_step(x_t, x_0, alpha_bar, alpha_bar_prev, noise, 1.0)
            assert torch.allclose(step, ancestral)

    def test_marginal(self):
        """For every eta x_prev is distributed as q(x_prev|x_0), and the noise in it has eta times
        the posterior's standard deviation."""
        x_0, zero, one = tensor(0.4), tensor(0.0), tensor(1.0)
        alpha_bar, alpha_bar_prev = ALPHA_BAR[700].item(), ALPHA_BAR[500].item()
        x_without_eps = Own.q_sample(x_0, alpha_bar, zero)
        x_with_eps = Own.q_sample(x_0, alpha_bar, one)
        mean = alpha_bar_prev**0.5 * x_0
        variance = Own.q_posterior(0.0, 0.0, alpha_bar, alpha_bar_prev)[1]
        for eta in (0.3, 0.5, 1.0):
            of_eps = dv.ddim_step(x_with_eps, x_0, alpha_bar, alpha_bar_prev, zero, eta) - mean
            of_noise = dv.ddim_step(x_without_eps, x_0, alpha_bar, alpha_bar_prev, one, eta) - mean
            assert torch.allclose(of_eps**2 + of_noise**2, tensor(1 - alpha_bar_prev))
            assert torch.allclose(of_noise, tensor(eta * variance**0.5))


@exercise('ddpm_loss', points=2)
class TestDDPMLoss:
    """The second line of the bound is a sum over t of -KL( q(x_{t-1}|x_t, x_0) || p(x_{t-1}|x_t) ),
    whose means are `q_posterior`'s for x_0 and for x_0_pred, and of two other terms. Show that each
    is w_t times a squared error of the network, plus a constant. DDPM sets w_t to 1. So noise each
    image to its own time: what is the network asked, and what is it to answer?"""

    x_0 = randn(3, 3, 4, 4, seed=1)
    eps = randn(3, 3, 4, 4, seed=2)
    t = torch.tensor([0, 500, 999])

    def test_what_the_network_gets(self):
        """The network gets t as it is, and each image noised by its own alpha_bar_t."""
        seen = []

        def eps_theta(*given):
            seen.extend(given)
            return torch.zeros_like(self.eps)

        dv.ddpm_loss(eps_theta, self.x_0, ALPHA_BAR, self.t, self.eps)
        x_t, t = seen
        assert torch.equal(t, self.t)
        for i in range(3):
            alpha_bar = ALPHA_BAR[self.t[i]]
            noised = alpha_bar.sqrt() * self.x_0[i] + (1 - alpha_bar).sqrt() * self.eps[i]
            assert torch.allclose(x_t[i], noised)

    def test_mean_squared_error(self):
        """The loss is the mean over all numbers of (eps - eps_theta)^2: 0 for the right eps, 9 if
        all are off by 3."""

        def eps_theta(x_t, t, off):
            return self.eps + off

        for off in (0.0, 3.0):
            network = partial(eps_theta, off=off)
            loss = dv.ddpm_loss(network, self.x_0, ALPHA_BAR, self.t, self.eps)
            assert loss.item() == pytest.approx(off**2)

    def test_gradient(self):
        """The gradient reaches the network: for eps_theta = w it is 2 (w - mean eps)."""
        w = tensor(0.3).requires_grad_()

        def eps_theta(x_t, t):
            return w.expand_as(x_t)

        dv.ddpm_loss(eps_theta, self.x_0, ALPHA_BAR, self.t, self.eps).backward()
        assert torch.allclose(w.grad, 2 * (w.detach() - self.eps.mean()))


@exercise('time_embedding', points=1)
class TestTimeEmbedding:
    def test_by_hand(self):
        """cos(w_i t), then sin(w_i t), for w_i = 1, 1/10, 1/100, 1/1000 if the width is 8."""
        of_0, of_37 = dv.time_embedding(torch.tensor([0, 37]), 8)
        assert of_0.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
        angles = [37 * 10.0**-i for i in range(4)]
        by_hand = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert torch.allclose(of_37.double(), tensor(*by_hand), atol=1e-5)

    def test_width(self):
        """[B] -> [B, width] for every even width, float32, on the device of t, and each of 1,000
        times is another."""
        for width in (8, 24, 128):
            embedding = dv.time_embedding(torch.arange(1000), width)
            assert embedding.shape == (1000, width) and embedding.dtype == torch.float32
            assert torch.cdist(embedding, embedding).fill_diagonal_(9).min() > 1e-3
        assert dv.time_embedding(torch.arange(3, device='meta'), 8).device.type == 'meta'


@exercise('network_input', points=1)
class TestNetworkInput:
    """Formulation 1: [x_t, x_hat], on the channel axis. Formulation 2: [x'_t, x_hat], with x'_t as
    above. By which shift does x'_t, for t >= 1, become an x_t that follows the process of section
    2? This x_t is what you are given, and what all samplers compute with."""

    x_t, x_hat = randn(2, 2, 3, 4, 4)

    def test_formulation_1(self):
        """Formulation 1: x_t, then the draft, on the channel axis."""
        shown = dv.network_input(self.x_t, self.x_hat, '1')
        assert torch.equal(shown, torch.cat([self.x_t, self.x_hat], 1))

    def test_formulation_2(self):
        """Formulation 2: what its own forward process makes, with mean sqrt(alpha_bar_t) x_0
        + x_hat, then the draft."""
        x_0, eps = randn(2, 2, 3, 4, 4, seed=1)
        shown = dv.network_input(0.6 * x_0 + 0.8 * eps, self.x_hat, '2')
        assert torch.allclose(shown[:, :3], 0.6 * x_0 + self.x_hat + 0.8 * eps)
        assert torch.equal(shown[:, 3:], self.x_hat)


@exercise('ema_update', points=1)
class TestEMAUpdate:
    def test_by_a_loop_of_numbers(self):
        """In step n average <- d average + (1 - d) parameter, d = min(decay, (1 + n)/(10 + n))."""
        average = [torch.zeros(1)]
        parameter = torch.zeros(1)
        value = 0.0
        for n in range(300):
            parameter.fill_(math.sin(n))
            dv.ema_update(average, [parameter], n, 0.95)
            d = 0.95 if (1 + n) / (10 + n) > 0.95 else (1 + n) / (10 + n)
            value = value * d + math.sin(n) * (1 - d)
            assert abs(average[0].item() - value) < 1e-5

    def test_in_place(self):
        """All averages change in place, without a gradient."""
        averages = [torch.zeros(2, 3), torch.zeros(4)]
        parameters = [torch.ones(2, 3, requires_grad=True), torch.ones(4, requires_grad=True)]
        views = [average[:] for average in averages]
        dv.ema_update(averages, parameters, 10, 0.9)
        assert all(map(torch.equal, averages, views))
        assert all(torch.allclose(average, torch.tensor(1 - 11 / 20)) for average in averages)
        assert not any(average.requires_grad for average in averages)


@exercise('slerp', points=3)
class TestSlerp:
    """For a and b of equal length: which weights of them turn a by w theta, in the plane of both?
    theta is their angle. The same weights are taken for all lengths. For which angles are they not
    finite? (Keep the cosine from -0.9999 to 0.9999.)"""

    def test_ends(self):
        """w = 0 gives a and w = 1 gives b."""
        a, b = randn(2, 3, 8, 8)
        assert torch.allclose(dv.slerp(a, b, 0.0), a) and torch.allclose(dv.slerp(a, b, 1.0), b)

    def test_same_angle_a_step(self):
        """Equal steps of w turn by equal angles, for images as one vector each."""
        a, b = randn(2, 2, 5, 5)
        b = b * a.norm() / b.norm()
        path = [dv.slerp(a, b, i / 4).flatten() for i in range(5)]
        cosines = [torch.cosine_similarity(p, q, dim=0) for p, q in itertools.pairwise(path)]
        assert max(cosines) - min(cosines) < 1e-9

    def test_lengths(self):
        """The angle is that of the directions: half-way to a vector at 60 degrees, whatever its
        length, the weights are sin(30) / sin(60) each."""
        a, b = tensor(1.0, 0.0), tensor(1.0, 3**0.5)  # of lengths 1 and 2
        assert torch.allclose(dv.slerp(a, b, 0.5), (a + b) / 3**0.5)
        assert torch.allclose(dv.slerp(b, a, 0.5), (a + b) / 3**0.5)
        b = tensor(-1.0, 3**0.5)  # at 120 degrees: sin(60) / sin(120)
        assert torch.allclose(dv.slerp(a, b, 0.5), a + b)

    def test_parallel(self):
        """Where the angle is 0 it is finite, and the straight line."""
        a = randn(3, 4)
        assert torch.allclose(dv.slerp(a, 2 * a, 0.5), 1.5 * a, rtol=1e-4)


def covariance_matrices(k, d, seed):
    """k positive definite matrices: [k, d, d]."""
    a = randn(k, d, d, seed=seed)
    return a @ a.mT + 0.5 * torch.eye(d, dtype=torch.float64)


@exercise('em_step', points=4)
class TestEMStep:
    """Which w, m and S maximise sum_nk r_nk log( w_k N(z_n; m_k, S_k) ), where all w_k add up to 1?
    (r_nk adds up to 1 over k; `ridge` is added to the diagonal of S, which may be singular else.)
    Which r are then p(k|z_n)? The densities underflow; their logarithms do not."""

    z = randn(40, 3)
    r = randn(40, 2, seed=1).softmax(1)

    def test_weighted_moments(self):
        """w, m and S are the moments of z weighted by r, plus the ridge (1e-6 by default)."""
        (weights, means, covariances), _, _ = dv.em_step(self.z, self.r, ridge=0.25)
        for k in range(2):
            share = self.r[:, k] / self.r[:, k].sum()
            mean = share @ self.z
            covariance = (self.z - mean).T @ torch.diag(share) @ (self.z - mean)
            assert torch.allclose(weights[k], self.r[:, k].mean())
            assert torch.allclose(means[k], mean)
            assert torch.allclose(covariances[k], covariance + 0.25 * torch.eye(3))

        (_, _, default), _, _ = dv.em_step(torch.zeros(4, 2).double(), torch.ones(4, 1).double())
        assert torch.allclose(default[0], 1e-6 * torch.eye(2).double())

    def test_responsibilities(self):
        """The new r is p(k|z) by Bayes' rule, and the likelihood the mean of log p(z), both of the
        new mixture."""
        (weights, means, covariances), r, log_p = dv.em_step(self.z, self.r)
        columns = []
        for k in range(2):
            component = MultivariateNormal(means[k], covariances[k])
            columns.append(weights[k] * component.log_prob(self.z).exp())
        p = torch.stack(columns, dim=1)
        assert torch.allclose(r, p / p.sum(1, keepdim=True))
        mixture = MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))
        assert torch.allclose(log_p, mixture.log_prob(self.z).mean())

    def test_likelihood_never_falls(self):
        """With ridge 0 the likelihood rises in every step."""
        r = self.r
        before = -math.inf
        for _ in range(30):
            _, r, log_p = dv.em_step(self.z, r, 0.0)
            assert log_p >= before - 1e-12
            before = log_p

    def test_underflow(self):
        """In 40 dimensions of deviation 10^10 every p underflows to 0, log p does not: two groups
        keep their responsibilities."""
        z = 1e10 * randn(200, 40) + 1e12 * torch.arange(2.0).repeat_interleave(100)[:, None]
        r = torch.eye(2).double().repeat_interleave(100, 0)
        _, new, log_p = dv.em_step(z, r)
        assert torch.allclose(new, r) and log_p.isfinite()


# ==== PART 2. THE GRADER GRADED: what must be caught, and what must pass ==========================

# ---- Wrong solutions -----------------------------------------------------------------------------
#      A mistake's name, and how to make it: a text of the own formula, and what replaces it.
#      Each runs and returns finite numbers of the right shape. Where a student's function does on
#      CALLS what one of them does, the report names it (`looks_like`).

WRONG = {
    'reparameterize': [
        ('variance for standard deviation', '.sqrt()', ''),
        ('logvar for standard deviation', 'logvar.exp().sqrt()', 'logvar'),
        ('the noise is not scaled', 'logvar.exp().sqrt() * ', ''),
        ('wrong sign of logvar', 'logvar.exp', '(-logvar).exp'),
        ('no gradient to mu', 'mu +', 'mu.detach() +'),
        ('no gradient to logvar', 'logvar.exp', 'logvar.detach().exp'),
    ],
    'kl_divergence': [
        ('the -1 is missing', '- 0.5', ''),
        ('logvar without the 1/2', '-logvar / 2', '-logvar'),
        ('wrong sign of logvar', '-logvar', 'logvar'),
        ('standard deviation for variance', 'logvar.exp()', '(logvar / 2).exp()'),
        ('mean over z for the sum', '.sum(-1)', '.mean(-1)'),
        ('mean over the batch', '.sum(-1)', '.sum(-1).mean().expand(len(mu))'),
        ('without the 1/2', '.sum(-1)', '.sum(-1) * 2'),
        ('the sign of all', 'terms.sum', '-terms.sum'),
    ],
    'negative_elbo': [
        ('mean over pixels for the sum', '/ len(y)', '/ y.numel()'),
        ('error summed over the batch', '** 2).sum() / len(y)', '** 2).sum()'),
        ('half the squared error', '** 2', '** 2 / 2'),
        ('KL without kl_weight', 'kl_weight * kl', 'kl'),
        ('kl_weight weighs the error', 'kl_weight * kl + error', 'kl + kl_weight * error'),
        ('KL summed over the batch', '/ len(mu)', ''),
        ('all summed over the batch', ' / len(mu)', '\n    error *= len(y)'),
        ('KL returned with its weight', 'error, error, kl', 'error, error, kl_weight * kl'),
    ],
    'linear_schedule': [
        ('beta one step ahead', 't * (', '(t + 1) * ('),
        ('beta_T is never reached', 'T - 1', 'T'),
        ('1 - beta without the product', 'product *=', 'product ='),
        ('1 comes first, the last is missing', 'tensor(alpha_bar', 'tensor([1.0, *alpha_bar[:-1]]'),
        (
            'the root of beta is linear',
            '(beta_1 + t * (beta_T - beta_1) / max(1, T - 1))',
            '(beta_1**0.5 + t * (beta_T**0.5 - beta_1**0.5) / max(1, T - 1)) ** 2',
        ),
        ('product of beta for 1 - beta', '1 - (beta_1', '(beta_1'),
        ('float32 for float64', '64', '32'),
    ],
    'q_sample': [
        ('variance for standard deviation', '(1 - alpha_bar) ** 0.5', '(1 - alpha_bar)'),
        ('alpha_bar for its square root', '* alpha_bar**0.5', '* alpha_bar'),
        ('the image is not scaled', '* alpha_bar**0.5', ''),
        ('1 - sqrt(alpha_bar) for 1 - alpha_bar', '1 - alpha_bar', '1 - alpha_bar**0.5'),
        ('1 - sqrt(alpha_bar), no root over it', '(1 - alpha_bar) ** 0.5', '(1 - alpha_bar**0.5)'),
        ('the image has the weight of the noise', '* alpha_bar**0.5', '* (1 - alpha_bar)**0.5'),
    ],
    'predict_x0': [
        ('alpha_bar for its square root', 'root = alpha_bar**0.5', 'root = alpha_bar'),
        ('noise added', 'x_t - noise', 'x_t + noise'),
        ('variance for standard deviation', '(1 - alpha_bar) ** 0.5', '(1 - alpha_bar)'),
        ('only x_t is divided', '(x_t - noise) / root', 'x_t / root - noise'),
        ('only the noise is divided', '(x_t - noise) / root', 'x_t - noise / root'),
        ('multiplied by sqrt(alpha_bar)', '/ root', '* root'),
        ('clipped here already', 'return x_0', 'return x_0.clamp(-1, 1)'),
    ],
    'q_posterior': [
        ('alpha_bar for its ratio', 'alpha_bar / alpha_bar_prev', 'alpha_bar'),
        ('weight of x_0: alpha_bar, not the next', 'alpha_bar_prev**0.5', 'alpha_bar**0.5'),
        ('alpha_bar_prev for its square root', 'alpha_bar_prev**0.5', 'alpha_bar_prev'),
        ('1 - beta for its square root', 'alpha**0.5', 'alpha'),
        ('variance: 1 - alpha_bar_prev is missing', ') * (1 - alpha_bar_prev)\n', ')\n'),
        ('standard deviation for variance', 'return mean, variance', 'return mean, variance**0.5'),
        ('beta for the variance', 'return mean, variance', 'return mean, 1 - alpha'),
        ('x_0 and x_t are exchanged', 'alpha = ', 'x_0, x_t = x_t, x_0\n    alpha = '),
    ],
    'ddpm_step': [
        ('variance for standard deviation', ' ** 0.5\n', '\n'),
        ('large and small are exchanged', "variance == 'large'", "variance == 'small'"),
        ('large is the default', "variance='small'", "variance='large'"),
        ('always the large variance', "variance == 'large'", 'True'),
        ('noise in the last step', '(alpha_bar_prev < 1) *', ''),
        ('large: 1 - alpha_bar for beta', '= 1 - alpha_bar / alpha_bar_prev', '= 1 - alpha_bar'),
    ],
    'ddim_step': [
        ('sqrt(eta) for eta', 'sigma = eta *', 'sigma = eta**0.5 *'),
        ('sigma without eta', 'sigma = eta *', 'sigma ='),
        ('sigma: beta for the variance', '(beta * (1 - alpha_bar_prev) / (1 - alpha_bar))', 'beta'),
        ('the noise is missing', ' + sigma * noise', ''),
        ('sigma^2 is missing under the root', 'alpha_bar_prev - sigma**2', 'alpha_bar_prev'),
        ('alpha_bar for alpha_bar_prev', 'mean = alpha_bar_prev**0.5', 'mean = alpha_bar**0.5'),
        ('direction: no square root', '- sigma**2) ** 0.5', '- sigma**2)'),
    ],
    'ddpm_loss': [
        ('alpha_bar[t - 1] for alpha_bar[t]', 'alpha_bar[i]', 'alpha_bar[i - 1]'),
        ('square root of alpha_bar', 'alpha_bar[i]', 'alpha_bar[i]**0.5'),
        ('sum for mean', '.mean()', '.sum()'),
        ('sum over pixels', '.mean()', '.flatten(1).sum(1).mean()'),
        ('absolute error, not squared', '(error**2)', 'error.abs()'),
        ('the network is told t + 1', ', t) - eps', ', t + 1) - eps'),
        ('the target is x_0, not eps', ') - eps', ') - x_0'),
        ('the network sees the clean image', '(torch.stack(noisy), t)', '(x_0, t)'),
        ('no gradient to the network', 'noisy), t)', 'noisy), t).detach()'),
    ],
    'time_embedding': [
        ('divided by half - 1, not by half', '-i / half', '-i / (half - 1)'),
        ('another base than 10^4', '10_000', '1_000'),
        ('divided by the width, not half of it', '-i / half', '-i / width'),
        ('times from 1 on', 'value *', '(value + 1) *'),
        ('the exponent is twice as large', '-i / half', '-2 * i / half'),
        ('sines come first', 'cosines + sines', 'sines + cosines'),
        ('float64 for float32', 'torch.tensor(rows)', 'torch.tensor(rows).double()'),
    ],
    'network_input': [
        ('Formulation 2: draft subtracted', "'2': x_hat + x_t", "'2': x_t - x_hat"),
        ('formulations exchanged', "'1': x_t, '2': x_hat + x_t", "'2': x_t, '1': x_hat + x_t"),
        ('Formulation 2 for both', "'1': x_t", "'1': x_t + x_hat"),
        ('Formulation 1 for both', "'2': x_hat + x_t", "'2': x_t"),
        ('the draft comes first', '(first, x_hat)', '(x_hat, first)'),
        ('x_hat alone in Formulation 2', "'2': x_hat + x_t", "'2': x_hat"),
    ],
    'ema_update': [
        ('the larger decay of both', 'd > decay', 'd < decay'),
        ('step for 1 + step', '(1 + step)', 'step'),
        ('the weights are exchanged', 'd * average + (1 - d)', '(1 - d) * average + d'),
        ('decay without the rise', 'd = (1 + step) / (10 + step)', 'd = decay'),
        ('a step off', '(1 + step) / (10 + step)', '(2 + step) / (11 + step)'),
        ('the averages stay as they were', 'average.copy_(d', 'average = (d'),
        ('d is not limited by decay', 'd > decay', 'd > 1'),
        ('new memory, not in place', 'average.copy_(', 'average.data = ('),
    ],
    'em_step': [
        ('covariance over N_k - 1', 'share, d', 'r / (N_k - 1), d'),
        ('cov without correction=0', 'share, d', 'r / (N_k - (r**2).sum(0) / N_k), d'),
        ('the mean is not subtracted', '[:, None] - m', '[:, None] - 0 * m'),
        ('softmax over the points', 'softmax(1)', 'softmax(0)'),
        ('the ridge is missing', '+ ridge *', '+ 0 *'),
        ('the ridge on all elements', 'torch.eye(D, dtype=z.dtype)', '1'),
        ('likelihood summed', 'joint.logsumexp(1).mean()', 'joint.logsumexp(1).sum()'),
        ('the weights are missing', '(N_k / N).log() + log_p', 'log_p'),
        ('the old responsibilities are returned', 'joint.softmax(1)', 'r'),
        ('underflow of small densities', 'joint.softmax(1)', 'F.normalize(joint.exp() + 1e-12, 1)'),
    ],
    'slerp': [
        ('from b to a', 'weight_a * a + weight_b * b', 'weight_b * a + weight_a * b'),
        ('the weight of a is linear', 'torch.sin((1 - w) * theta) / theta.sin()', '1 - w'),
        ('the straight line', 'weight_a * a + weight_b * b', '(1 - w) * a + w * b'),
        ('cosine: |a|^2 for |a| |b|', 'b.norm()', 'a.norm()'),
        ('cosine: not divided by the lengths', ' / (a.norm() * b.norm())', ''),
        ('an angle a row', 'theta = cosine', 'theta = F.cosine_similarity(a, b, -1)[..., None]'),
        ('the weight of b is linear', 'torch.sin(w * theta)', 'w * torch.sin(theta)'),
    ],
}


def some_network(x_t, t):
    """Stands for eps_theta: its answer depends on the image and on the time."""
    return x_t * (2 + t[:, None, None, None])


# Arguments for each exercise. On the first a solution must at least return finite numbers of the
# right shape; on all of them together no two mistakes behave alike.
IMAGES, OTHERS, EPS = randn(3, 2, 3, 4, 4)
X_0, X_T, NOISE = 3 * randn(3, 4)  # some beyond [-1, 1], where a clip would show
CODES = randn(2, 2, 5)
FAR = 1e8 * randn(9, 2)  # codes so far apart that densities nearly underflow
HALF = 0.5 + 0.1 * randn(9, 1).tanh()
SHARES = torch.cat([HALF, 1 - HALF], 1)
AVERAGES = [torch.zeros(3), torch.ones(2)]
PARAMETERS = [nn.Parameter(2 * torch.ones(3)), nn.Parameter(3 * torch.ones(2))]
CALLS = {
    'reparameterize': [randn(3, 4, 4)],
    'kl_divergence': [randn(2, 4, 4)],
    'negative_elbo': [(IMAGES, OTHERS, *CODES), (IMAGES, OTHERS, *CODES, 0.3)],
    'linear_schedule': [(), (10, 0.01, 0.1)],
    'q_sample': [(IMAGES, 0.3, EPS)],
    'predict_x0': [(IMAGES, 0.3, EPS)],
    'q_posterior': [(X_0, X_T, 0.3, 0.6)],
    'ddpm_step': [
        (X_T, X_0, 0.3, 0.6, NOISE),
        (X_T, X_0, 0.3, 0.6, NOISE, 'small'),
        (X_T, X_0, 0.3, 0.6, NOISE, 'large'),
        (X_T, X_0, 0.3, 1.0, NOISE, 'large'),
    ],
    'ddim_step': [(X_T, X_0, 0.3, 0.6, NOISE), (X_T, X_0, 0.3, 0.6, NOISE, 0.5)],
    'ddpm_loss': [(some_network, IMAGES, ALPHA_BAR, torch.tensor([300, 700]), EPS)],
    'time_embedding': [(torch.tensor([3, 5]), 6)],
    'network_input': [(IMAGES, OTHERS, '1'), (IMAGES, OTHERS, '2')],
    'ema_update': [(AVERAGES, PARAMETERS, 3, 0.9), (AVERAGES, PARAMETERS, 10**4, 0.99)],
    'em_step': [(randn(9, 2), SHARES), (randn(9, 2), SHARES, 0.1), (FAR, SHARES, 0.1)],
    'slerp': [(IMAGES, OTHERS, 0.3), (X_0, 2 * X_0 + NOISE, 0.3), (0.1 * X_0, 0.1 * X_T, 0.3)],
}


def flat(answer):
    """All tensors of a solution's answer, or of its arguments."""
    if answer is None or isinstance(answer, str) or callable(answer):
        return []
    if not isinstance(answer, (tuple, list)):
        return [torch.as_tensor(answer)]
    parts = []
    for part in answer:
        parts += flat(part)
    return parts


def shapes(parts):
    """The shapes of tensors, in words."""
    return ', '.join(str(list(part.shape)) for part in flat(parts)) or 'nothing'


def edited(name, old, new):
    """The own formula `name` with one text replaced, as a function."""
    source = textwrap.dedent(inspect.getsource(getattr(Own, name)))
    assert old in source, (name, old)
    scope = dict(globals())
    exec(source.replace(old, new, 1), scope)
    return scope[name]


def behaviour(name, solution):
    """All that can be seen of a solution, as tensors: for each of CALLS its answer, what it did to
    its arguments, and the gradients of the answer."""
    seen = []
    for call in CALLS[name]:
        # Copies, which a solution may change in place; gradients are those of their sources.
        sources = []
        clones = []
        arguments = []
        for argument in call:
            if isinstance(argument, list):
                argument = [t.detach().clone().requires_grad_(t.requires_grad) for t in argument]
                clones += argument
            elif isinstance(argument, torch.Tensor):
                argument = argument.detach().clone()
                if argument.is_floating_point():
                    sources.append(argument.requires_grad_())
                    argument = argument.clone()
                clones.append(argument)
            arguments.append(argument)
        places = [clone.data_ptr() for clone in clones]

        # The answer, and whether the arguments have other values, memory or gradients.
        torch.manual_seed(0)  # for a solution that draws noise of its own
        answer = flat(solution(*arguments))
        seen += [part.detach() for part in answer + clones]
        seen.append(torch.tensor([clone.data_ptr() for clone in clones]) == torch.tensor(places))
        seen.append(torch.tensor([clone.requires_grad for clone in clones]))

        # The gradients of a weighted sum of the answer: 0 where there are none.
        if sources and any(part.requires_grad for part in answer):
            total = 0
            for part in answer:
                total = total + (part.flatten() * torch.linspace(1, 2, part.numel())).sum()
            gradients = torch.autograd.grad(total, sources, allow_unused=True)
        else:
            gradients = [None] * len(sources)
        for gradient, source in zip(gradients, sources):
            seen.append(torch.zeros_like(source) if gradient is None else gradient)
    return seen


def general_mistake(name, solution):
    """What no solution of any exercise may do, in words: change its arguments, draw random numbers
    of its own, return another shape. None if it does not, or does not run."""
    names = inspect.signature(getattr(Own, name)).parameters
    try:
        with replaced(others(name)), time_limit(TIME_LIMIT / 4):
            for call in CALLS[name]:
                arguments, kept = copy.deepcopy(call), copy.deepcopy(call)
                answer = flat(solution(*arguments))
                wanted = flat(getattr(Own, name)(*kept))
                for argument, *values in zip(names, call, arguments, kept):
                    given, changed, right = map(flat, values)  # right: `ema_update` changes one
                    if alike(given, right) and not alike(given, changed):
                        return f'changes its argument {argument}.'
                if not alike(answer, flat(solution(*copy.deepcopy(call)))):
                    return 'draws random numbers of its own.'
                found, right, of = map(shapes, (answer, wanted, call))
                if found != right:
                    return f'returns shape {found}, not {right}, for arguments of {of}.'
    except (Exception, SystemExit, TimeLimit):
        return None
    return None


def looks_like(name, solution, seconds=TIME_LIMIT / 4):
    """The mistake in WRONG that behaves exactly like a solution, or None."""
    with replaced(others(name)):
        try:
            with time_limit(seconds):
                seen = behaviour(name, solution)
        except (Exception, SystemExit, TimeLimit):
            return None
        if alike(seen, behaviour(name, getattr(Own, name))):
            return None
        for mistake, known in behaviours_of_mistakes(name):
            if alike(seen, known):
                return mistake
    return None


@cache
def behaviours_of_mistakes(name):
    """A list of (mistake, behaviour), one for each wrong solution of an exercise."""
    with replaced(others(name)):
        wrong = [(mistake, edited(name, old, new)) for mistake, old, new in WRONG[name]]
        return [(mistake, behaviour(name, solution)) for mistake, solution in wrong]


def alike(these, those):
    """Whether two behaviours are the same, but for rounding."""
    if [(t.shape, t.dtype) for t in these] != [(t.shape, t.dtype) for t in those]:
        return False
    near = dict(rtol=1e-5, atol=1e-6, equal_nan=True)
    return all(torch.allclose(a.double(), b.double(), **near) for a, b in zip(these, those))


@pytest.mark.parametrize('name', EXERCISES)
def test_grader_catches_wrong_solutions(name):
    """Each wrong solution runs, violates at least one property, and is called what it is: no two
    of an exercise behave alike, or have the same name."""
    call = CALLS[name][0]
    wanted = flat(getattr(Own, name)(*copy.deepcopy(call)))  # some change their arguments
    for mistake, old, new in WRONG[name]:
        wrong = edited(name, old, new)
        answer = flat(wrong(*copy.deepcopy(call)))
        assert [part.shape for part in answer] == [part.shape for part in wanted], mistake
        assert all(part.isfinite().all() for part in answer), mistake
        assert grade(name, wrong), f'{name}: {mistake} passes'
        assert looks_like(name, wrong) == mistake
    names = [mistake for mistake, _, _ in WRONG[name]]
    assert len(names) == len(set(names)) >= 6


@pytest.mark.parametrize('name', EXERCISES)
def test_grader_passes_different_solutions(name):
    """A correct solution violates no property, however it is written, and is no mistake: neither
    our own formula nor that of diffusevae.py."""
    skip_unless_all_are_solved()
    for solution in (getattr(Own, name), EXERCISES[name].solution):
        assert grade(name, solution) == []
        assert looks_like(name, solution) is None


@pytest.mark.parametrize('name', EXERCISES)
def test_grader_says_general_things_first(name):
    """Which argument is changed, noise of its own, another shape: of every exercise."""
    own = getattr(Own, name)

    def wrong(*arguments, changed=None, factor=1.0, shape=()):
        answer = own(*arguments)
        if changed is not None:
            arguments[changed].add_(1)
        return [part.expand((*shape, *part.shape)) * factor for part in flat(answer)]

    for i, argument in enumerate(inspect.signature(own).parameters):
        if isinstance((*CALLS[name][0], *[None] * 9)[i], torch.Tensor):
            said = general_mistake(name, partial(wrong, changed=i))
            assert said == f'changes its argument {argument}.'
    if name != 'ema_update':  # which returns nothing
        assert general_mistake(name, partial(wrong, shape=(2,))).startswith('returns shape [2')
        noisy = general_mistake(name, lambda *given: wrong(*given, factor=1 + torch.rand(())))
        assert noisy == 'draws random numbers of its own.'
    assert general_mistake(name, own) is None


def test_grader_stops_an_endless_loop():
    """A solution that never ends, and catches every Exception, fails all tests of its exercise."""

    def endless(*args):
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))

    assert len(grade('slerp', endless, seconds=0.1)) == len(properties('slerp'))


def test_blanked_file_lacks_the_chosen_exercises_and_nothing_else(tmp_path, capsys):
    """Each keeps docstring and signature, and says its number; all else is as it was. --list
    prints number, name and points; --only blanks those, and what exists is kept."""
    skip_unless_all_are_solved()
    path = tmp_path / 'blank.py'
    assert lecture('exercise', '--out', path) == 0
    assert f'python test_diffusevae.py grade {path}' in capsys.readouterr().out
    blank = load_module(path, 'blank')
    for name, cls in EXERCISES.items():
        _, doc = inspect.getdoc(getattr(blank, name)).split('\n\n', 1)
        assert doc == inspect.getdoc(getattr(dv, name))
        assert inspect.signature(getattr(blank, name)) == inspect.signature(getattr(dv, name))
        with pytest.raises(NotImplementedError, match=f'Exercise {cls.number}: {name}'):
            getattr(blank, name)(*copy.deepcopy(CALLS[name][0]))

    def rest(path):
        nodes = ast.parse(path.read_text(encoding='utf-8')).body
        return [ast.dump(node) for node in nodes if getattr(node, 'name', None) not in EXERCISES]

    assert rest(path) == rest(GRADED)
    text = path.read_text(encoding='utf-8')
    formula = '# x_0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)'
    assert '    # Solve `q_sample` for the image.\n    raise' in text and formula not in text
    for answer in ('hence q(', "Let x_t := x'_t", 'difference to the draft'):
        assert answer not in text and answer in GRADED.read_text(encoding='utf-8')
    assert '    # alpha_bar_t = prod_{s <= t} (1 - beta_s)' in text  # given: it is a definition
    assert lecture('exercise', '-o', tmp_path / 'with.py', '--formulas') == 0
    assert formula in (tmp_path / 'with.py').read_text(encoding='utf-8')
    for wrong, named in ((['-o', path], 'exists'), (['--only', '16'], '--only')):
        assert lecture('exercise', *wrong) == 2 and named in capsys.readouterr().err
    assert path.read_text(encoding='utf-8') == text

    assert lecture('exercise', '-o', tmp_path / 'some.py', '--only', '4,14') == 0
    text = (tmp_path / 'some.py').read_text(encoding='utf-8')
    assert '\n#    4  linear_schedule 1\n#   14  slerp           3\n#\n' in text
    assert re.findall(r"Error\('Exercise (\d+)", text) == ['4', '14']
    assert lecture('exercise', '--list') == 0
    assert '\n 3  negative_elbo   2\n' in capsys.readouterr().out


# ==== PART 3. ALL THE REST, in the sections of diffusevae.py ======================================

draw_all_shapes = dv.draw_shapes
generate = dv.Trained.generate


def few_shapes(n, generator, size=32):
    """At most 1,000 images where a program's run draws 22,000: most of a short test's time."""
    return draw_all_shapes(min(n, 1000), generator, size)


def few_steps(trained, num=8, **more):
    """5 steps where the picture of a training run has 50: most of a short run's time."""
    return generate(trained, num, **({'steps': 5} | more))


dv.draw_shapes = few_shapes  # here; processes draw all
dv.Trained.generate = few_steps


def count(module):
    """The number of a module's parameters."""
    return sum(p.numel() for p in module.parameters())


def recorded(module):
    """A list that grows by (inputs, output) with every call of a module."""
    calls = []

    def record(module, inputs, output):
        calls.append((inputs, output))

    module.register_forward_hook(record)
    return calls


def config(stage=2, **given):
    """The settings of a fresh run."""
    return dv.resolve({'stage': stage, **given}, {}, None)


def load_images(data, root='data', size=32, train=True, **more):
    """A set of images, by default the training images of 32x32 pixels."""
    settings = dv.TrainingOptions(stage=1, data=str(data), root=str(root), size=size)
    return dv.load_images(settings, train, **more)


def tiny(form='1', z_dim=0, channels=1, size=8, T=T, **unet):
    """A DiffuseVAE for 8x8 images with random weights in the zero-initialised layers, too."""
    torch.manual_seed(0)
    vae = None
    if form != 'uncond':
        widths = {8: 8, 4: 8, 1: 4}
        vae = dv.VAE(channels, size, {8: 0, 4: 0, 1: 0}, {1: 0, 4: 0, 8: 0}, widths)
    in_channels = channels if form == 'uncond' else 2 * channels
    net = dv.UNet(in_channels, channels, size, 8, [1, 2], 1, [4], heads=2, z_dim=z_dim, **unet)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return dv.DiffuseVAE(vae, net, dv.Diffusion(dv.linear_schedule(T)), form)


def test_the_file_stays_minimal():
    """At most CODE_LINES lines of code: what comes in pushes something out."""
    source = GRADED.read_text(encoding='utf-8')
    comments = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.append(token.start[0])
    skipped = {i for i in comments if source.splitlines()[i - 1].lstrip().startswith('#')}
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module))
        if documented and ast.get_docstring(node) is not None:
            skipped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = [i for i, line in enumerate(source.splitlines(), 1) if line.strip()]
    assert len(set(lines) - skipped) <= CODE_LINES


# ---- 1. VAE --------------------------------------------------------------------------------------


def test_backbone_by_hand():
    """Blocks, pooling, upsampling and width changes at the right places; a block adds to h four
    convolutions, each of the GELU of what comes before."""
    width = {8: 4, 4: 6, 1: 10}
    down = dv.backbone({8: 2, 4: 0, 1: 1}, width)
    up = dv.backbone({1: 1, 4: 2, 8: 0}, width)
    layers = [type(layer).__name__.removesuffix('2d') for layer in (*down, *up)]
    to_4x4 = ['VAEBlock', 'VAEBlock', 'VAEBlock', 'AvgPool', 'Conv']
    to_1x1 = ['VAEBlock', 'AvgPool', 'Conv', 'VAEBlock']
    and_back = ['VAEBlock', 'Upsample', 'Conv', 'VAEBlock', 'VAEBlock', 'Upsample', 'Conv']
    assert layers == [*to_4x4, *to_1x1, *and_back]

    h = x = randn(2, 4, 8, 8).float()
    for layer in (*down, *up):
        if isinstance(layer, dv.VAEBlock):
            branch = h
            for conv in layer.convs:
                assert not conv.bias.any()
                branch = conv(F.gelu(branch))
            h = h + branch
        elif isinstance(layer, nn.AvgPool2d):
            factor = 2 if h.shape[2] == 8 else 4
            h = h.unfold(2, factor, factor).unfold(3, factor, factor).mean((4, 5))
        elif isinstance(layer, nn.Upsample):
            factor = 4 if h.shape[2] == 1 else 2
            h = h.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        else:
            h = torch.einsum('oi,biyx->boyx', layer.weight[..., 0, 0], h)  # 1x1, without a bias
    assert h.shape == x.shape and torch.allclose(up(down(x)), h, atol=1e-5)


def test_vae_maps_images_to_codes_and_back():
    """Mean and variance differ, drafts stay in [0, 1], and the loss is that of a sampled z."""
    vae = tiny().vae
    x = torch.rand(3, 1, 8, 8)
    mu, logvar = vae.encode(x)
    eps = randn(3, 4).float()
    by_hand = Own.negative_elbo(x, vae.decode(mu + (logvar / 2).exp() * eps), mu, logvar)
    losses = vae(x, eps)
    assert list(losses) == ['loss', 'squared_error', 'kl']
    assert all(map(torch.allclose, losses.values(), by_hand))

    assert mu.shape == logvar.shape == (3, 4) and not torch.equal(mu, logvar)
    for bias, value in ((50.0, 1), (-50.0, 0)):
        nn.init.constant_(vae.head.bias, bias)
        assert torch.allclose(vae.decode(mu), torch.full_like(x, value))


def test_signals_by_hand():
    """What the VAE models: the image, its grey, its 4x4 means, or all but its middle."""
    x = torch.rand(2, 3, 8, 8)
    grey = (x[:, :1] + x[:, 1:2] + x[:, 2:]).expand_as(x) / 3
    low = torch.kron(x.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)), torch.ones(4, 4))
    middle = torch.zeros(8, 8)
    middle[2:6, 2:6] = 1
    by_hand = {'image': x, 'grey': grey, 'lowres': low, 'masked': x * (1 - middle)}
    for name, y in dv.SIGNALS.items():
        assert torch.allclose(y(x), by_hand[name], atol=1e-6)
        assert torch.allclose(y(y(x)), y(x), atol=1e-6)  # so y has the code of x

    # Colour neither reaches the code nor counts in the error.
    layout = {8: 0, 4: 0, 1: 0}, {1: 0, 4: 0, 8: 0}, {8: 8, 4: 8, 1: 4}
    vae = dv.VAE(3, 8, *layout, signal='grey')
    assert torch.allclose(vae.encode(x)[0], vae.encode(grey)[0], atol=1e-6)
    draft = vae.decode(vae.encode(x)[0])
    squared_error = vae(x, torch.zeros(2, 4))['squared_error']
    assert torch.allclose(squared_error, ((grey - draft) ** 2).sum() / 2)


# ---- 2. Diffusion --------------------------------------------------------------------------------


def test_formulation_2_sampled_as_in_the_paper_agrees_with_ours():
    """The paper's own chain: from N(x_hat, I), posterior with (1 - c_t) x_hat, x_0 last."""
    model = tiny('2', T=20)
    alpha_bars = Own.linear_schedule(20).tolist()
    z = randn(2, 4).float()
    start = randn(2, 1, 8, 8).float()
    noises = randn(20, 2, 1, 8, 8).float()

    with torch.no_grad():
        x_hat = 2 * model.vae.decode(z) - 1
        x = start + x_hat
        for t, noise in zip(range(19, -1, -1), noises):
            eps = model.unet(torch.cat([x, x_hat], 1), torch.full((2,), t))
            alpha_bar = alpha_bars[t]
            x_0 = ((x - x_hat - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5).clamp(-1, 1)
            if t == 0:
                x = x_0
                break
            alpha_bar_prev = alpha_bars[t - 1]
            beta = 1 - alpha_bar / alpha_bar_prev
            c_0 = alpha_bar_prev**0.5 * beta / (1 - alpha_bar)
            c_t = (1 - beta) ** 0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)
            std = (beta * (1 - alpha_bar_prev) / (1 - alpha_bar)) ** 0.5
            x = c_0 * x_0 + c_t * x + (1 - c_t) * x_hat + std * noise

    rest = iter(noises)
    how = dict(steps=20, sampler='ddpm', spacing='uniform')
    draft, refined = model.generate(z, start, lambda: next(rest), **how).values()
    assert torch.allclose(draft, (x_hat + 1) / 2)
    assert torch.allclose(refined, (x + 1) / 2, atol=1e-5)


@pytest.mark.parametrize('sampler', dv.SAMPLERS)
@pytest.mark.parametrize('steps, spacing, tolerance', GRIDS)
def test_samplers_reproduce_a_known_gaussian(sampler, steps, spacing, tolerance):
    """x_0 ~ N(m, s^2) has the exact denoiser (x_t - sqrt(a) m) sqrt(1 - a) / (a s^2 + 1 - a)."""
    mean, std = 0.3, 0.1
    times = []
    generator = torch.Generator().manual_seed(0)

    def exact(x_t, t):
        times.append(int(t[0]))
        alpha_bar = ALPHA_BAR[t[0]].item()
        variance = alpha_bar * std**2 + 1 - alpha_bar  # of x_t
        return (x_t - alpha_bar**0.5 * mean) * (1 - alpha_bar) ** 0.5 / variance

    def noise():
        return torch.randn(4000, 1, 1, 1, generator=generator, dtype=torch.float64)

    x_T = noise()
    if spacing == 'quadratic':  # starts at 0.8 T: give it the right mean and variance there
        start = ALPHA_BAR[800]
        x_T = start.sqrt() * mean + (start * std**2 + 1 - start).sqrt() * x_T
    x = dv.Diffusion(ALPHA_BAR).sample(exact, x_T, noise, steps, sampler, spacing)

    assert len(times) == steps == len(set(times)) and times == sorted(times, reverse=True)
    assert abs(x.mean() - mean) < 0.01
    if sampler == 'ddpm-large' and steps < 1000:
        assert x.std() > 0.9 * std  # too much noise a step on a coarse grid: known, not an error
    else:
        assert abs(x.std() / std - 1) < tolerance


def test_x_0_pred_is_clipped_before_it_is_used_and_eps_follows():
    """An absurd network: every estimate is clipped, so DDIM lands on a noisy version of +-1."""
    x_T = randn(2, 1, 4, 4)
    seen = []

    def eps_theta(x_t, t):
        seen.append(x_t)
        return -1e4 * torch.ones_like(x_t)  # predicts x_0 = +infinity

    x = dv.Diffusion(ALPHA_BAR).sample(eps_theta, x_T, lambda: 0, 2, 'ddim', 'uniform')
    alpha_bar, alpha_bar_prev = ALPHA_BAR[999].item(), ALPHA_BAR[499].item()
    eps = (x_T - alpha_bar**0.5) / (1 - alpha_bar) ** 0.5
    assert torch.allclose(seen[1], alpha_bar_prev**0.5 + (1 - alpha_bar_prev) ** 0.5 * eps)
    assert torch.equal(x, torch.ones_like(x))


def test_times_for_every_number_of_steps():
    """A grid of n steps has n distinct times of the chain from high to low, for every n; the
    quadratic one starts where sqrt(alpha_bar) falls below 0.039, of any schedule."""
    for total in (1, 2, 3, 10, 1000):
        schedule = Own.linear_schedule(total).tolist()
        for spacing, times in dv.SPACINGS.items():
            for n in range(1, total + 1):
                grid = times(schedule, n)
                assert len(grid) == n and sorted(set(grid), reverse=True) == grid
                assert grid[-1] >= 0 and grid[0] < total
                if spacing == 'uniform' or n == 1:
                    assert grid[0] == total - 1
    assert dv.uniform_times(schedule, 10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert dv.quadratic_times(schedule, 5) == [800, 450, 200, 50, 0]
    cosine = torch.cos(torch.linspace(0.01, 1.569, 400, dtype=torch.float64)) ** 2
    diffusion = dv.Diffusion(cosine)
    assert diffusion.schedule == cosine.tolist() and diffusion.alpha_bar.dtype == torch.float32
    start = dv.quadratic_times(diffusion.schedule, 10)[0]
    assert cosine[start].sqrt() < 0.039 <= cosine[start - 1].sqrt()


# ---- 3. U-Net ------------------------------------------------------------------------------------


@pytest.mark.parametrize('heads', [1, 4])
def test_attention_agrees_with_a_loop_over_heads_and_pixels(heads):
    """Each pixel gets the values of all pixels, weighted by softmax(q k / sqrt(d)), by head; at
    the start, nothing."""
    layer = dv.Attention(8, heads, groups=1).double()
    h = randn(2, 8, 3, 4)
    assert torch.equal(layer(h), h)  # at the start
    nn.init.normal_(layer.out.weight)
    qkv = layer.qkv(layer.norm(h))
    q, k, v = qkv.flatten(2).chunk(3, dim=1)  # [2, 8, 12] each
    d = 8 // heads
    mixed = torch.zeros(2, 8, 12, dtype=torch.float64)
    for b in range(2):
        for head in range(heads):
            rows = slice(head * d, (head + 1) * d)
            for i in range(12):
                score = torch.stack([q[b, rows, i] @ k[b, rows, j] for j in range(12)]) / d**0.5
                mixed[b, rows, i] = v[b, rows] @ score.softmax(0)
    assert torch.allclose(layer(h), h + layer.out(mixed.view(2, 8, 3, 4)))


@pytest.mark.parametrize('scale_shift', [False, True])
def test_res_block_by_hand(scale_shift):
    """GroupNorm, SiLU, conv; + Linear(SiLU(emb)) before the next norm, or scale and shift after it;
    SiLU, conv, which starts at zero; skip by a 1x1 conv if the width changes."""
    h = randn(2, 8, 4, 4, seed=1)
    emb = randn(2, 6, seed=2)
    for width in (8, 12):
        block = dv.ResBlock(8, width, 0, 6, scale_shift, groups=4, dropout=0.0).double()
        skip = h if width == 8 else F.conv2d(h, block.skip.weight, block.skip.bias)
        assert torch.allclose(block(h, emb), skip)
        nn.init.normal_(block.conv2.weight)
        r = block.conv1(F.silu(block.norm1(h)))
        told = block.project(F.silu(emb))[:, :, None, None]
        if scale_shift:
            r = block.norm2(r) * (1 + told[:, :width]) + told[:, width:]
        else:
            r = block.norm2(r + told)
        assert torch.allclose(block(h, emb), skip + block.conv2(F.silu(r)))


def test_unet_layers_in_the_papers_order():
    """Skips after the stem, each block and each downsampling; attention only where asked for; 32
    groups from 128 channels on and below, so that no mean colour is lost, one."""
    with torch.device('meta'):
        net = dv.UNet(6, 3, 32, 128, [1, 2, 2, 2], 2, [16], heads=8)
        small = dv.UNet(6, 3, 32, 64, [1, 2, 2, 2], 2, [16], heads=8)
    down = [layer for layer in net.down if isinstance(layer, dv.ResBlock)]
    up = [layer for layer in net.up if isinstance(layer, dv.ResBlock)]
    assert [block.conv1.in_channels for block in down] == [128] * 3 + [256] * 5
    # Up, h and skip: 4x4 and 8x8 all 256 + 256; 16x16 takes the 128 of the first downsampling last.
    assert [block.conv1.in_channels for block in up] == [512] * 8 + [384] + [384, 256, 256]
    for network, groups in ((net, 32), (small, 1)):
        norms = [m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)]
        assert norms == [groups] * (2 * (8 + 2 + 12) + 6 + 1)

    attention = [m for m in net.modules() if isinstance(m, dv.Attention)]
    calls = [recorded(layer) for layer in attention]
    net(torch.zeros(1, 6, 32, 32, device='meta'), torch.zeros(1, device='meta'))
    assert sorted(output.shape[-1] for ((_, output),) in calls) == [4, 16, 16, 16, 16, 16]
    assert all(layer.heads == 8 for layer in attention)
    with torch.device('meta'):  # the paper's large network
        assert count(dv.UNet(6, 3, 32, 160, [1, 2, 2, 2], 3, heads=8)) == 70_875_203


def test_every_stored_map_reaches_its_partner_on_the_way_up():
    """The network by hand: time and z, stem, block, halving, block, bottleneck; each map beside h,
    newest first; the last layers. A new one predicts no noise; features drop in training only."""
    net = tiny('uncond', z_dim=4, dropout=0.5).unet.eval()
    x = torch.randn(2, 1, 8, 8)
    t = torch.tensor([5, 900])
    z = torch.randn(2, 4)
    embedding = net.time_mlp(Own.time_embedding(t, 8)) + net.z_mlp(z)
    block_8, halving, block_4 = net.down
    stem = net.stem(x)
    fine = block_8(stem, embedding)
    halved = halving(fine)
    coarse = block_4(halved, embedding)

    h = net.bottleneck[1](net.bottleneck[0](coarse, embedding), embedding)
    up_1, up_2, doubling, up_3, up_4 = net.up
    h = up_1(torch.cat([h, coarse], 1), embedding)
    h = up_2(torch.cat([h, halved], 1), embedding)
    h = doubling[1](h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    h = up_3(torch.cat([h, fine], 1), embedding)
    h = up_4(torch.cat([h, stem], 1), embedding)
    assert torch.allclose(net(x, t, z), net.head(F.silu(net.head_norm(h))), atol=1e-5)
    net.train()
    assert not torch.equal(net(x, t, z), net(x, t, z))
    assert not dv.UNet(1, 1, 8, 8, [1, 2], 1)(x, t).any()


def test_head_and_output_are_float32_when_the_rest_is_bfloat16():
    """Convolutions run in bfloat16, the last one in exact float32, not in TF32 either."""
    dv.choose_device('cpu')  # as every command does: it turns TF32 off
    net = tiny('uncond').unet
    net.bfloat16 = True
    stem = recorded(net.stem)
    head = recorded(net.head)
    net(torch.randn(1, 1, 8, 8), torch.tensor([5]))
    assert [output.dtype for _, output in stem] == [torch.bfloat16]
    assert [inputs[0].dtype for inputs, _ in head] == [torch.float32]
    assert [output.dtype for _, output in head] == [torch.float32]
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


COUNTS = {  # of VAE, U-Net, baseline, and U-Net with z
    'cifar10': (9_243_107, 35_749_763, 35_746_307, 38_835_971),
    'celeba64': (14_011_907, 82_644_099, 82_640_643, 87_306_243),
    'celebahq128': (21_098_275, 95_167_747, 95_164_291, 100_420_355),
    'celebahq256': (32_632_579, 113_676_675, 113_673_219, 119_585_923),
}


@pytest.mark.parametrize('preset', COUNTS)
def test_presets_have_the_papers_sizes_and_run(preset):
    """Exact parameter counts of VAE, U-Net, baseline and U-Net with z; the losses run."""
    settings = config(2, preset=preset)
    vae = dataclasses.asdict(config(1, preset=preset))
    with replaced({'linear_schedule': lambda: ALPHA_BAR}), torch.device('meta'):
        model = dv.build(config(2, preset=preset, vae=vae), 3)
        baseline = dv.build(config(2, preset=preset, form='uncond'), 3)
        with_z = dv.build(config(2, preset=preset, z_cond=True, vae=vae), 3)
    networks = model.vae, model.unet, baseline.unet, with_z.unet
    assert tuple(map(count, networks)) == COUNTS[preset]
    losses_on_meta(model.to('meta'), (2, 3, settings.size, settings.size))


def losses_on_meta(model, shape):
    """The losses of a model and of its VAE, with no tensor anywhere but on `meta`."""
    losses = []
    for stage in (model, model.vae):
        if stage is not None:
            random = stage.random_inputs(shape, dv.make_generator(0))
            random = {name: tensor.to('meta') for name, tensor in random.items()}
            losses.append(stage(torch.rand(shape, device='meta'), **random)['loss'])
            assert losses[-1].device.type == 'meta' and losses[-1].shape == ()
    return losses


@pytest.mark.parametrize('form, z_dim', [('1', 4), ('2', 0), ('uncond', 0)])
def test_no_tensor_on_the_wrong_device(form, z_dim):
    """Every form, with z and without, with every sampler, entirely on `meta`."""
    model = tiny(form, z_dim).to('meta')
    losses_on_meta(model, (2, 1, 8, 8))[0].backward()
    z = torch.randn(2, model.z_dim, device='meta')
    x_T = torch.randn(2, 1, 8, 8, device='meta')
    for sampler in dv.SAMPLERS:
        how = dict(steps=2, sampler=sampler, spacing='uniform')
        images = model.generate(z, x_T, lambda: torch.randn_like(x_T), **how)
        assert images['refined'].device.type == 'meta' and images['refined'].shape == x_T.shape


# ---- 4. The two-stage model ----------------------------------------------------------------------


@pytest.mark.parametrize('form', ['1', '2', 'uncond'])
def test_loss_of_stage_2_by_hand(form):
    """x_hat = 2 f(mu + sigma eps_z) - 1 of the same image, x_0 = 2 x - 1; the network is shown
    [x_t, x_hat], [x_t + x_hat, x_hat], or x_t alone."""
    model = tiny(form)
    calls = recorded(model.unet)
    x = torch.rand(2, 1, 8, 8)
    t = torch.tensor([100, 900])
    eps = torch.randn(2, 1, 8, 8)
    eps_z = torch.randn(2, 4)
    alpha_bar = ALPHA_BAR[t].float().view(2, 1, 1, 1)
    x_in = x_t = Own.q_sample(2 * x - 1, alpha_bar, eps)
    if form != 'uncond':
        mu, logvar = model.vae.encode(x)
        x_hat = 2 * model.vae.decode(mu + (logvar / 2).exp() * eps_z) - 1
        x_in = Own.network_input(x_t, x_hat, form)
    loss = model(x, t, eps_z, eps, torch.ones(2))['loss']
    (((shown, times, *_), answer),) = calls
    assert torch.allclose(shown, x_in, atol=1e-6) and torch.equal(times, t)
    assert torch.allclose(loss, (answer - eps).square().mean())


def test_training_times_are_uniform():
    """Every index 0 ... T - 1 is drawn with the same frequency, whatever the batch."""
    model = tiny('1', T=10)
    draws = [model.random_inputs((7, 1, 1, 1), dv.make_generator(i))['t'] for i in range(3000)]
    frequency = torch.bincount(torch.cat(draws), minlength=10) / (7 * 3000)
    assert len(frequency) == 10 and (frequency - 0.1).abs().max() < 0.006


@pytest.mark.parametrize('form', ['1', '2'])
def test_guidance_and_its_null_condition_by_hand(form):
    """eps = (1 + w) eps(x_hat, z) - w eps(0, 0); the null call is shown x_t in both forms."""
    model = tiny(form, z_dim=4).eval()
    w = 1.7
    z = torch.randn(2, 4)
    x_T = torch.randn(2, 1, 8, 8)
    t = torch.tensor([999, 999])
    x_hat = 2 * model.vae.decode(z) - 1
    first = x_T + x_hat if form == '2' else x_T
    conditioned = model.unet(torch.cat([first, x_hat], 1), t, z)
    null = model.unet(torch.cat([x_T, 0 * x_hat], 1), t, 0 * z)
    eps = (1 + w) * conditioned - w * null
    alpha_bar = ALPHA_BAR[-1].item()
    x_0 = ((x_T - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5).clamp(-1, 1)
    how = dict(guidance=w, steps=1, sampler='ddim', spacing='uniform')
    refined = model.generate(z, x_T, lambda: 0, **how)['refined']
    assert torch.allclose(refined, (x_0 + 1) / 2, atol=1e-4)


def test_condition_is_dropped_by_image_at_the_given_rate():
    """Dropped: x_hat = 0 and z = 0, so Formulation 2 is shown x_t; the others keep theirs."""
    model = tiny('2', z_dim=4)
    calls = recorded(model.unet), recorded(model.unet.z_mlp)
    random = model.random_inputs((4, 1, 8, 8), dv.make_generator(0))
    random['keep'] = torch.tensor([1.0, 0, 1, 0])
    model(torch.rand(4, 1, 8, 8), **random)
    (((shown, _), _),), (((z,), _),) = calls
    assert not shown[1::2, 1].any() and not z[1::2].any()
    assert shown[::2, 1].abs().amax((1, 2)).all() and z[::2].any(dim=1).all()

    model.cond_drop = 0.2
    shape = (10, 1, 1, 1)
    kept = [model.random_inputs(shape, dv.make_generator(i))['keep'] for i in range(500)]
    kept = torch.cat(kept)
    assert abs(kept.mean() - 0.8) < 0.03 and set(kept.tolist()) == {0.0, 1.0}


# ---- 5. Data -------------------------------------------------------------------------------------


def test_shapes_repeat_and_their_factors_describe_them():
    """The same seed gives the same image; ground colour, position and size show in the pixels."""
    images, factors = dv.draw_shapes(200, dv.make_generator(3))
    again, _ = dv.draw_shapes(200, dv.make_generator(3))
    assert images.dtype == torch.uint8 and images.shape == (200, 3, 32, 32)
    assert torch.equal(images, again)
    assert set(factors['kind'].tolist()) == {0, 1, 2}

    # What differs from the corner's colour is the shape: its centre of mass is (x, y).
    ground = images[:, :, :1, :1].float()
    inside = ((images - ground).abs().sum(1) > 30).double()
    grid = (torch.arange(32) + 0.5) / 32
    for axis, name in ((1, 'x'), (2, 'y')):
        center = (inside.sum(axis) * grid).sum(1) / inside.sum((1, 2))
        assert (center - 0.435 - 0.13 * factors[name]).abs().max() < 0.03

    # No held-out shape is among those for training; a few are the first of all.
    train = load_images('shapes')
    known = {image.numpy().tobytes() for image in train.pixels}
    held_out = load_images('shapes', train=False).pixels[:100]
    assert not any(image.numpy().tobytes() in known for image in held_out)
    few = load_images('shapes', num=5)
    assert torch.equal(few.pixels, train.pixels[:5]) and len(few.attributes['hue']) == 5


def test_digits_are_padded_to_32_and_in_random_order(tmp_path, monkeypatch):
    """28x28 images get a black margin, red, green and blue stay what they are; classes follow; the
    first few are no file's first few."""

    def of_torchvision(root, train, download):
        """A set of 40 images, the i-th of value i in red, and of digit i % 10."""
        assert root == str(tmp_path) and train and download
        pixels = torch.arange(40, dtype=torch.uint8)
        if data != 'cifar10':
            pixels = pixels[:, None, None].expand(-1, 28, 28)
            targets = torch.arange(40) % 10
            return types.SimpleNamespace(data=pixels, targets=targets, classes='0123456789')
        red = pixels[:, None, None, None] * torch.tensor([1, 0, 0], dtype=torch.uint8)
        red = red.repeat(1, 32, 32, 1).numpy()
        red[:, 0] = 0  # the top row is black: height is not width
        targets = [i % 10 for i in range(40)]
        return types.SimpleNamespace(data=red, targets=targets, classes='0123456789')

    sets = ('mnist', 'MNIST', 2), ('fashion', 'FashionMNIST', 2), ('cifar10', 'CIFAR10', 0)
    for data, name, margin in sets:
        monkeypatch.setattr(dv.datasets, name, of_torchvision)
        images = load_images(data, tmp_path)
        assert images.pixels.shape == (40, 3 if data == 'cifar10' else 1, 32, 32)
        numbers = images.pixels[:, 0, 16, 16]
        assert sorted(numbers.tolist()) == list(range(40)) != numbers.tolist()
        assert torch.equal(images.attributes['3'], numbers % 10 == 3)
        inner = torch.zeros(32, 32)
        inner[max(1, margin) : 32 - margin, margin : 32 - margin] = 1
        x = images.batch(slice(None))
        assert torch.allclose(255 * x[:, 0], numbers[:, None, None] * inner) and not x[:, 1:].any()
        assert torch.equal(load_images(data, tmp_path, num=3).pixels, images.pixels[:3])
        with pytest.raises(dv.UserError, match='--size 64'):
            load_images(data, tmp_path, size=64)


def picture(path, colour=(255, 0, 0), size=(32, 32)):
    """A file with an image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, colour).save(path)


def of_values(values, mode):
    """A picture of one row of values in a mode of Pillow."""
    kinds = {'I': np.int32, 'I;16': np.uint16, 'F': np.float32}
    return Image.fromarray(np.array([values], dtype=kinds[mode]))


def of_palette(transparent):
    """A picture of two equal pixels in a palette of red, which may be transparent, and blue."""
    picture = Image.new('P', (2, 1), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    if transparent:
        picture.info['transparency'] = 0
    return picture


PIXELS = {  # a name: (the picture, the suffix of its file, its pixel in the middle)
    'black and white': (Image.new('1', (2, 1), 1), 'png', 255),
    'grey': (Image.new('L', (2, 1), 77), 'png', 77),
    'grey, transparent': (Image.new('RGBA', (4, 4), (9, 9, 9, 0)).convert('LA'), 'png', 255),
    'colour, transparent': (Image.new('RGBA', (4, 4), (200, 0, 0, 0)), 'png', (255, 255, 255)),
    '40% of red on white': (Image.new('RGBA', (4, 4), (200, 0, 0, 102)), 'tiff', (233, 153, 153)),
    'palette': (of_palette(False), 'gif', (255, 0, 0)),
    'palette, transparent': (of_palette(True), 'gif', 255),
    'inks': (Image.new('CMYK', (2, 1), (255, 0, 0, 0)), 'tiff', (0, 255, 255)),
    '16 bits': (of_values([0, 0x8080, 0xFFFF], 'I;16'), 'png', 128),
    '16 bits, dark': (of_values([0, 257, 514], 'I;16'), 'png', 1),
    '32 bits': (of_values([0, 0x8080, 0xFFFF], 'I'), 'tiff', 128),
}


@pytest.mark.parametrize('name', PIXELS)
def test_pixels_of_every_mode(tmp_path, name):
    """White is white and black is black in every mode, of 16 bits whatever a picture's brightest
    pixel is; what is transparent becomes white."""
    picture, suffix, pixel = PIXELS[name]
    path = tmp_path / f'x.{suffix}'
    picture.save(path)
    found = dv.read_picture(path, 25, crop=True).float()
    assert found.shape == (3, 25, 25)
    assert (found[:, 12, 12] - torch.tensor(pixel).expand(3)).abs().max() <= 1


def test_photographs_are_turned_upright_and_cropped(tmp_path):
    """EXIF's orientation is obeyed; the middle square of a wide picture stays."""
    photograph = Image.new('RGB', (1600, 1200), (255, 255, 255))
    photograph.paste((200, 30, 30), (200, 0, 1400, 1200))  # the middle square is red
    photograph.paste((30, 30, 200), (200, 0, 800, 1200))  # and its left half blue
    exif = photograph.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees: left comes to the top
    photograph.save(tmp_path / 'x.jpg', exif=exif, quality=95)

    found = dv.read_picture(tmp_path / 'x.jpg', 32, crop=True).float()
    for y, colour in ((2, (30, 30, 200)), (29, (200, 30, 30))):
        assert (found[:, y, 16] - torch.tensor(colour)).abs().max() < 6


def reds(folder, size=16):
    """How red the images of a folder are, of all of them, and how many are held out."""
    train, held_out = [load_images(folder, size=size, train=train) for train in (True, False)]
    values = [*train.pixels[:, 0, 4, 4].tolist(), *held_out.pixels[:, 0, 4, 4].tolist()]
    return sorted(values), len(held_out.pixels)


def test_every_picture_of_a_folder_is_found_once(tmp_path):
    """All formats of Pillow, upper case, linked folders once; hidden files are no pictures."""
    for i, name in enumerate(('a.jfif', 'b.PNG', 'c.Webp', 'd.JP2', 'sub/e.tif', 'sub/deep/f.ppm')):
        picture(tmp_path / 'data' / name, colour=(40 * i, 0, 9))
    for name in ('._b.PNG', '.hidden/g.png'):
        picture(tmp_path / 'data' / name)
    picture(tmp_path / 'elsewhere' / 'h.png', colour=(255, 255, 9))
    (tmp_path / 'data' / 'link').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'elsewhere' / 'circle').symlink_to(tmp_path / 'data')
    (tmp_path / 'data' / 'again.PNG').symlink_to(tmp_path / 'data' / 'b.PNG')
    (tmp_path / 'data' / 'notes.txt').write_text('not counted')
    found, _ = reds(tmp_path / 'data')
    expected = [0, 40, 80, 120, 160, 200, 255]
    assert all(abs(a - b) <= 3 for a, b in zip(found, expected, strict=True))


def test_unreadable_files_are_counted_in_one_line_and_left_out(tmp_path, capsys):
    """60 pictures, 299 truncated ones and one of floats, of no known white, are 60 images."""
    for i in range(60):
        picture(tmp_path / f'{i}.png', colour=(4 * i, 0, 0))
    whole = (tmp_path / '0.png').read_bytes()
    for i in range(299):
        (tmp_path / f'broken{i}.png').write_bytes(whole[:-30])
    of_values([0.0, 1.0], 'F').save(tmp_path / 'floats.tiff')
    found, held_out = reds(tmp_path)
    assert found == [4 * i for i in range(60)] and held_out >= 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all('pictures cannot be read, for example' in e for e in errors)
    assert sum(int(re.search(r'(\d+) of', error)[1]) for error in errors) == 300


def test_what_is_wrong_with_a_folder(tmp_path, monkeypatch):
    """Missing, one picture, all broken, too many for the memory: each its own message."""
    none = 'nor a folder of 2 pictures'
    for i, named in enumerate((none, none, '1 of 1 pictures cannot', 'of 2 pictures 0 fit into')):
        if i == 3:
            monkeypatch.setattr(os, 'sysconf', lambda name: 10)
        with pytest.raises(dv.UserError, match=named):
            load_images(tmp_path / 'data', size=16)
        (tmp_path / 'data').mkdir(exist_ok=True)
        (tmp_path / 'data' / f'{i}.png').write_bytes(b'junk')


def test_folder_held_out_images_stay_held_out(tmp_path):
    """Five percent, by name: the same for a moved folder, disjoint from training, and stable."""
    colours = [(i, j, 0) for i in range(0, 250, 10) for j in range(0, 240, 20)]
    for i, colour in enumerate(colours):
        picture(tmp_path / 'one' / f'{i}.png', colour, (8, 8))

    def colour_set(folder, train):
        images = load_images(folder, size=16, train=train)
        return {tuple(image[:, 0, 0].tolist()) for image in images.pixels}

    held_out = colour_set(tmp_path / 'one', False)
    assert 5 <= len(held_out) <= 30 and not held_out & colour_set(tmp_path / 'one', True)
    (tmp_path / 'one').rename(tmp_path / 'two')
    for i in range(20):
        picture(tmp_path / 'two' / f'new{i}.png', (0, 0, 255), (8, 8))
    assert held_out <= colour_set(tmp_path / 'two', False)


def test_grey_pictures_have_one_channel_and_fit_a_model_of_three(tmp_path):
    """One channel if all are grey; a model gets as many as it has, whatever the few are."""
    for i in range(30):
        picture(tmp_path / f'{i}.png', colour=(8 * i, 8 * i, 8 * i))
    assert load_images(tmp_path).pixels.shape[1] == 1
    assert load_images(tmp_path, channels=3).pixels.shape[1] == 3
    picture(tmp_path / 'red.png')
    assert load_images(tmp_path).pixels.shape[1] == 3
    grey = load_images(tmp_path, channels=1)
    assert grey.pixels.shape[1] == 1 and 85 in grey.pixels[:, 0, 0, 0].tolist()


def test_a_file_gets_its_name_when_it_is_whole(tmp_path, monkeypatch):
    """All bytes are beside the old file before it goes; what fails, or is interrupted, leaves the
    old one and nothing beside it."""
    path = tmp_path / 'new' / 'a.pt'
    dv.write_atomically(path, lambda file: file.write(b'old'))
    os_replace = os.replace
    seen = []

    def recorded_replace(source, target):
        seen.append((Path(source).read_bytes(), Path(target).read_bytes()))
        return os_replace(source, target)

    monkeypatch.setattr(os, 'replace', recorded_replace)
    dv.write_atomically(path, lambda file: file.write(b'new'))
    assert seen == [(b'new', b'old')] and path.read_bytes() == b'new'

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'replace', interrupted)
    with pytest.raises(KeyboardInterrupt):
        dv.write_atomically(path, lambda file: file.write(b'newer'))
    assert path.read_bytes() == b'new' and [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize('terminal', [False, True])
def test_progress_is_one_line(monkeypatch, capsys, terminal):
    """On a terminal it is rewritten, and never wider; elsewhere a line every ten seconds."""
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(dv, 'time', clock)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal)
    monkeypatch.setattr(os, 'get_terminal_size', lambda: os.terminal_size((40, 20)))
    progress = dv.Progress()
    for second in range(1, 25):
        clock.now = second
        progress.show(f'{second} ' + 60 * 'x')
    progress.show('done', end=True)
    out = capsys.readouterr().out
    if terminal:
        assert out.count('\n') == 1 and max(map(len, out.splitlines())) == 39 + len('\x1b[K')
    else:
        assert [line.split()[0] for line in out.splitlines()] == ['1', '11', '21', 'done']


# ---- 6. Settings ---------------------------------------------------------------------------------


def test_preset_settings():
    """The numbers of the paper's training, as section 4 of the brief gives them."""
    cifar10 = dict(lr=2e-4, warmup=5000, clip=1.0, ema=0.9999, flip=True, batch=256, heads=8)
    cifar10 |= dict(cooldown=0, save_every=600)  # a checkpoint has 2 GB
    vae = dict(lr=1e-4, cooldown=0, clip=math.inf, ema=0, flip=False, batch=128, kl_weight=1.0)
    vae |= dict(z_dim=512, save_every=600)
    letters = dict(data='letters', flip=False, save_every=60)  # not mirrored if not asked for
    for preset, stage, expected in (
        ('small', 2, letters),
        ('cifar10', 2, cifar10 | dict(dropout=0.3, epochs=2850)),
        ('cifar10', 1, vae | dict(epochs=500)),
        ('celeba64', 1, vae | dict(epochs=245)),
        ('celebahq128', 1, dict(flip=True, z_dim=1024, batch=126)),
        ('celebahq256', 2, dict(lr=2e-5, dropout=0.1, batch=64, size=256, epochs=1000, steps=None)),
    ):
        data = {'data': 'letters'} if preset == 'small' else {}
        found = dataclasses.asdict(config(stage, preset=preset, **data))
        assert {name: found[name] for name in expected} == expected
    assert config(2, preset='cifar10', channels=160, blocks=3).channels == 160


def test_epochs_make_the_steps_of_the_images_there_are(tmp_path, monkeypatch, capsys):
    """Epochs times images over batch, rounded up; --steps counts more, and extends."""
    for i in range(30):
        picture(tmp_path / f'data/{i}.png', colour=(8 * i, 250 - 8 * i, 40))
    tiny = dv.PRESETS['tiny'][1] | dict(steps=None, epochs=2, batch=7)
    monkeypatch.setitem(dv.PRESETS, 'epochs', {1: tiny, 2: dv.SMALL[2]})
    command = ['train', '--stage', 1, '--preset', 'epochs', '--data', tmp_path / 'data']
    for more, expected in (([], 9), ([], 9), (['--steps', 10], 10)):
        assert run(*command, '--out', tmp_path / 'run', *more) == 0
        saved = torch.load(tmp_path / 'run/stage1.pt', weights_only=True)
        assert saved['images']['number'] == 29 and saved['step'] == expected
    assert 'unrecognized' in (run('train', '--stage', 1, '--epochs', 2), capsys.readouterr().err)[1]


def test_an_option_exists_only_where_it_is_used(capsys):
    """Help lists the options of a command, stage and form, with their defaults; others are
    unrecognized. At most 40 different ones."""
    names = set()
    for command, known, unknown in (
        ('train --stage 1', ['--z-dim Z', 'weight of the KL (default 0.2)'], '--channels'),
        ('train --stage 2', ['--cond-drop', '--heads', '(default 3600)'], '--kl-weight'),
        ('train --stage 2 --form uncond', ['--heads'], '--z-cond'),
        ('sample', ['--gmm', '--png', '(default runs/shapes)'], '--attribute'),
        ('edit', ['--attribute', '(default 8)'], '--gmm'),
        ('evaluate', ['--seeds', '(default 5,10,25)', '(default 500)'], '--png'),
    ):
        with pytest.raises(SystemExit):
            run(*command.split(), '--help')
        text = ' '.join(capsys.readouterr().out.split())
        assert all(name in text for name in known) and unknown not in text, command
        names |= set(re.findall(r'--[a-z][a-z-]*', text))
        assert run(*command.split(), unknown, 1) == 2
        assert f'unrecognized arguments: {unknown}' in capsys.readouterr().err
    assert len(names - {'--help', '--no-flip', '--no-z-cond', '--no-png'}) <= 40


# ---- 7. Training ---------------------------------------------------------------------------------


def run(*args):
    """A command of diffusevae.py in process: its exit code."""
    return dv.main([str(arg) for arg in args])


# A preset with the smallest VAE for 32x32; processes do not have it.
dv.PRESETS['tiny'] = {1: dv.SMALL[1] | dict(z_dim=4), 2: dv.SMALL[2]}
dv.PAPER_VAES['tiny'] = {32: 0, 8: 1, 1: 0}, {1: 0, 8: 1, 32: 0}, {32: 4, 8: 4}

SMALL = ['--channels', 4, '--multipliers', '1,1', '--heads', 1, '--batch', 4]
FEW = ['--preset', 'tiny', '--batch', 4]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A tiny run of both stages and all forms on shapes."""
    out = tmp_path_factory.mktemp('run')
    assert run('train', '--stage', 1, '--out', out, '--steps', 12, *FEW) == 0
    for form in ('1', '2', 'uncond'):
        assert run('train', '--stage', 2, '--form', form, '--out', out, '--steps', 12, *SMALL) == 0
    return out


def contents(path):
    """Everything of a checkpoint that must not depend on interruptions, by its place in it."""
    saved = torch.load(path, weights_only=True)
    optimizer = saved['optimizer']
    values = {'step': saved['step'], 'groups': optimizer['param_groups']}
    parts = {'model': saved['model'], 'ema': saved['ema'], **optimizer['state']}
    for part, tensors in parts.items():
        for name, value in tensors.items():
            values[part, name] = value.numpy().tobytes()
    return values


def test_training_writes_checkpoint_and_picture(trained):
    """A run leaves a picture, and a checkpoint with the averaged weights beside the last ones."""
    for name in ('stage1', 'stage2-form1', 'stage2-uncond'):
        assert Image.open(trained / f'{name}.png').width > 500
    saved = torch.load(trained / 'stage2-form2.pt', weights_only=True)
    first = torch.load(trained / 'stage1.pt', weights_only=True)
    averaged = first['ema']
    for part in ('model', 'ema'):  # stage 2 has the averaged VAE, and does not move it
        assert all(torch.equal(saved[part][f'vae.{name}'], p) for name, p in averaged.items())
    assert not torch.equal(averaged['stem.weight'], first['model']['stem.weight'])
    assert not torch.equal(saved['ema']['unet.stem.weight'], saved['model']['unet.stem.weight'])
    assert saved['settings']['form'] == '2' and dv.same_images(saved['images'], first['images'])


def test_resumed_training_is_bit_identical(trained, tmp_path, monkeypatch, capsys):
    """20 steps at once, and 10 + 10 after a Ctrl-C in step 13, which says how to go on: with
    dropout, mirroring, EMA and clipping on."""
    training_inputs = dv.training_inputs

    def interrupted(model, images, settings, step, device):
        if step == 13:
            raise KeyboardInterrupt
        return training_inputs(model, images, settings, step, device)

    command = ['train', '--stage', 2, '--steps', 20, *SMALL, '--dropout', 0.3, '--flip']
    for name in ('whole', 'parts'):
        path = tmp_path / name / 'stage2-form1.pt'
        path.parent.mkdir()
        shutil.copy(trained / 'stage1.pt', path.parent)
        if name == 'parts':
            with monkeypatch.context() as patch:
                patch.setattr(dv, 'training_inputs', interrupted)
                assert run(*command, '--out', path.parent, '--save-every', 0) == 130
            assert 'the same command goes on' in capsys.readouterr().err
            assert torch.load(path, weights_only=True)['step'] == 10
        assert run(*command, '--out', path.parent) == 0
    assert contents(path) == contents(tmp_path / 'whole' / path.name)


def test_learning_rate_rises_and_falls(tmp_path, monkeypatch):
    """Linearly in the first two of six steps, and in the last half, never to 0."""
    rates = []
    step = torch.optim.Adam.step

    def recorded_step(self):
        rates.append(self.param_groups[0]['lr'])
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, 'step', recorded_step)
    command = ['train', '--stage', 1, '--out', tmp_path, *FEW, '--steps', 6, '--lr', 0.006]
    assert run(*command, '--warmup', 2, '--cooldown', 0.5) == 0
    assert rates == pytest.approx([0.003, 0.006, 0.006, 0.006, 0.004, 0.002])


def test_every_step_draws_its_own_noise(tmp_path, monkeypatch):
    """Noise of the module and of dropout: a function of (seed, step) alone, of dropout of the
    process, too. (What a step leaves in a buffer, which no gradient moves, is averaged, too.)"""
    forward = dv.VAE.forward
    drawn = []

    def recorded_forward(self, x, eps_z):
        drawn.append(eps_z.sum().item())
        drawn.append(torch.rand(1).item())  # as dropout would draw
        self.mean_colour.fill_(drawn[-1])
        return forward(self, x, eps_z)

    monkeypatch.setattr(dv.VAE, 'forward', recorded_forward)
    for i, seed in enumerate((0, 0, 1)):
        command = ['train', '--stage', 1, '--steps', 3, '--seed', seed, '--out', tmp_path / str(i)]
        assert run(*command, *FEW) == 0
    assert len(drawn) == 18 and drawn[:6] == drawn[6:12] and len(set(drawn)) == 12
    assert dv.seed_of(0, 'dropout', 3, 0) != dv.seed_of(0, 'dropout', 3, 1)
    averaged = torch.load(tmp_path / '2/stage1.pt', weights_only=True)['ema']
    assert averaged['mean_colour'].unique().item() == pytest.approx(drawn[-1])


@pytest.mark.parametrize('mean', [(0.95, 0.95, 0.95), (0.9, 0.02, 0.2)])
def test_no_set_of_images_kills_the_vae_at_the_start(mean):
    """The decoder starts at the mean colour: from 0.5 the last sigmoid would be driven flat."""
    pixels = torch.tensor(mean).view(1, 3, 1, 1) + 0.02 * torch.randn(30, 3, 32, 32)
    images = dv.Images((255 * pixels).round().clamp(0, 255).byte(), {})
    vae = dv.new_model(config(1), None, images, torch.device('cpu'))
    seen = images.batch(slice(None)).mean((0, 2, 3))
    assert torch.allclose(vae.head.bias.sigmoid(), seen, atol=1e-3)
    assert torch.allclose(vae.mean_colour.flatten(), seen, atol=1e-3)

    # What the encoder sees has mean 0: the same code for the same picture in other colours.
    calls = recorded(vae.stem)
    vae.encode(images.batch(slice(None)))
    (((shown,), _),) = calls
    assert shown.mean((0, 2, 3)).abs().max() < 1e-3


def test_a_run_that_cannot_become_good_says_so(tmp_path, capsys, monkeypatch):
    """A code that carries nothing is a warning at step 300; a loss or gradient that is not finite
    ends the run, and the last checkpoint stays."""
    for step, losses, warned in (
        (290, {'loss': 90.0, 'kl': 0.001}, False),
        (300, {'loss': 90.0, 'kl': 0.001}, True),
        (300, {'loss': 90.0, 'kl': 9.0}, False),
        (300, {'loss': 0.5}, False),  # stage 2 has no code of its own
    ):
        dv.check_losses(losses, 1.0, step)
        assert ('the code carries nothing (KL 0.001' in capsys.readouterr().err) == warned
    with pytest.raises(dv.UserError, match='gradient'):
        dv.check_losses({'loss': 0.5}, math.inf, 10)

    command = ['train', '--stage', 1, '--out', tmp_path, '--save-every', 0, *FEW]
    assert run(*command, '--steps', 10) == 0
    before = (tmp_path / 'stage1.pt').read_bytes()
    loss = dv.negative_elbo
    monkeypatch.setattr(dv, 'negative_elbo', lambda *args: [math.nan * x for x in loss(*args)])
    assert run(*command, '--steps', 40) == 2 and 'steps up to 20' in capsys.readouterr().err
    assert (tmp_path / 'stage1.pt').read_bytes() == before


def test_resume_finish_extend_contradict(trained, capsys):
    """A finished run says how to extend it; settings of a run cannot be changed."""
    before = (trained / 'stage1.pt').read_bytes()
    assert run('train', '--stage', 1, '--out', trained) == 0  # 2400 steps are not asked for
    assert 'a larger --steps extends it' in capsys.readouterr().out
    assert run('train', '--stage', 1, '--out', trained, '--batch', 8) == 2
    assert '--batch 8' in capsys.readouterr().err
    assert run('train', '--stage', 2, '--out', trained, '--channels', 8) == 2
    assert run('train', '--stage', 2, '--out', trained, '--size', 64) == 2
    assert (trained / 'stage1.pt').read_bytes() == before


def test_a_new_option_does_not_make_old_runs_unreadable(trained, tmp_path, capsys):
    """Settings that a checkpoint lacks take their default, which cannot be changed any more."""
    for name in ('stage1', 'stage2-form1'):
        saved = torch.load(trained / f'{name}.pt', weights_only=True)
        for option in ('dropout', 'signal', 'cond_drop', 'warmup', 'cooldown'):
            saved['settings'].pop(option, None)
        torch.save(saved, tmp_path / f'{name}.pt')
    assert run('train', '--stage', 2, '--out', tmp_path, '--steps', 14, '--dropout', 0.5) == 2
    assert run('train', '--stage', 2, '--out', tmp_path, '--steps', 14) == 0
    assert run('sample', '--out', tmp_path, '--steps', 1, '--num', 1) == 0
    saved['settings']['later'] = 1  # is unknown here: of another program
    torch.save(saved, tmp_path / 'stage2-form1.pt')
    assert run('sample', '--out', tmp_path) == 2
    assert 'stage2-form1.pt: no checkpoint of this program' in capsys.readouterr().err


def test_a_run_goes_on_with_its_own_pictures_only(tmp_path, capsys):
    """Its folder may move; other pictures are refused."""
    for name, first in (('a', 0), ('b', 5)):
        for i in range(30):
            picture(tmp_path / name / f'{i}.png', colour=(8 * i, first, 0))
    out = ['--out', tmp_path / 'o']
    command = ['train', '--stage', 1, *FEW, *out, '--steps']
    assert run(*command, 1, '--data', tmp_path / 'a') == 0
    shutil.move(tmp_path / 'a', tmp_path / 'moved')
    capsys.readouterr()
    assert run(*command, 3) == 2 and 'nor a folder' in capsys.readouterr().err
    for stage in (1, 2):
        how = ['train', '--stage', stage, '--steps', 3, *out, *(SMALL if stage == 2 else FEW)]
        assert run(*how, '--data', tmp_path / 'b') == 2
        assert 'not the images' in capsys.readouterr().err
        assert run(*how, '--data', tmp_path / 'moved') == 0
    assert torch.load(tmp_path / 'o/stage1.pt', weights_only=True)['step'] == 3
    shown = ['reconstruct', '--steps', 1, '--num', 1, *out]
    shutil.move(tmp_path / 'moved', tmp_path / 'again')
    assert run(*shown) == 2 and run(*shown, '--data', tmp_path / 'again') == 0


def test_a_run_does_not_train_on_its_own_pictures(tmp_path, capsys):
    """A run inside of its folder of images is refused before it writes a picture there."""
    for i in range(3):
        picture(tmp_path / 'data' / f'{i}.png')
    for out in (tmp_path / 'data', tmp_path / 'data' / 'runs' / 'x'):
        command = ['train', '--stage', 1, '--steps', 1, '--data', tmp_path / 'data', *FEW]
        assert run(*command, '--out', out) == 2
        assert 'is inside of --data' in capsys.readouterr().err
    assert len(list((tmp_path / 'data').rglob('*.p*'))) == 3


def test_training_images_are_mirrored_left_to_right():
    """With --flip half of a batch's images are mirrored, each as a whole; else none."""
    pixels = torch.arange(3 * 32 * 32).view(1, 3, 32, 32).byte()
    images = dv.Images(pixels, {})
    for flip, fewest, most in ((True, 9, 23), (False, 0, 0)):
        settings = config(2, form='uncond', flip=flip, batch=32)
        x = dv.training_inputs(tiny('uncond'), images, settings, 0, torch.device('cpu'))['x']
        mirrored = [torch.equal(image, pixels[0].flip(2) / 255) for image in x]
        assert fewest <= sum(mirrored) <= most
        assert sum(torch.equal(image, pixels[0] / 255) for image in x) == 32 - sum(mirrored)


def test_a_kill_loses_save_every_seconds_and_ten_steps_at_most(tmp_path, monkeypatch):
    """A checkpoint, and a picture with it, at the first tenth step after --save-every seconds: of a
    clock on which ten steps take 21 seconds, 60 have passed at the thirtieth and the sixtieth."""
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    training_inputs = dv.training_inputs
    write_atomically = dv.write_atomically
    written = []

    def inputs(*args):
        clock.now += 2.1
        return training_inputs(*args)

    def write(path, what):
        write_atomically(path, what)
        if path.suffix == '.pt':
            written.append(torch.load(path, weights_only=True)['step'])
        else:
            written.append(path.suffix)

    monkeypatch.setattr(dv, 'training_inputs', inputs)
    monkeypatch.setattr(dv, 'write_atomically', write)
    monkeypatch.setattr(dv, 'time', clock)
    assert run('train', '--stage', 1, '--out', tmp_path, '--steps', 70, *FEW) == 0
    assert written == [30, '.png', 60, '.png', 70, '.png']


# ---- 8. Sampling ---------------------------------------------------------------------------------


def test_samples_do_not_depend_on_their_number(trained):
    """Image i is the same whatever --num is; the next chunk is another."""
    model = dv.load(trained)
    few = model.generate(3, steps=2)
    many = model.generate(66, steps=2)
    assert all(torch.allclose(few[name], many[name][:3], atol=1e-5) for name in many)
    assert len(many['draft']) == 66 and not torch.allclose(many['draft'][64:], many['draft'][:2])
    for size, chunk in ((32, 64), (64, 64), (128, 16), (256, 4), (1024, 1)):
        assert dv.replace(model, settings=dv.replace(model.settings, size=size)).chunk == chunk
    options = dv.SamplingOptions(**dv.SAMPLING | dict(num=66, steps=2, gmm=None))
    rest = model.new_chunk(options, 64)
    assert all(torch.allclose(rest[name], many[name][64:], atol=1e-5) for name in many)


def test_a_trained_model_in_a_notebook(trained, tmp_path):
    """`load`, `generate`, `encode` and `decode`; given z or drafts share their noise."""
    model = dv.load(trained, form='2')
    x = model.images(train=False).batch(slice(66))
    z, _ = model.encode(x)
    drafts, refined = model.generate(z=z, steps=2).values()
    assert torch.allclose(drafts, model.decode(z), atol=1e-6) and len(refined) == 66
    same = model.generate(z=z[:1].expand(2, -1), steps=2, sampler='ddpm-large')['refined']
    assert torch.allclose(same[0], same[1], atol=1e-5)  # the noise is shared
    again, of_drafts = model.generate(draft=drafts[:3], steps=2).values()
    assert torch.equal(again, drafts[:3]) and torch.allclose(of_drafts, refined[:3], atol=1e-4)
    other = model.generate(2, steps=2, seed=1)
    assert not torch.equal(other['refined'], model.generate(2, steps=2)['refined'])

    vae = dv.load(shutil.copytree(trained, tmp_path / 'moved'), form=None)  # stage 1 alone
    assert torch.allclose(vae.decode(vae.encode(x[:3])[0]), drafts[:3], atol=1e-6)
    baseline = dv.load(trained, form='uncond')
    assert list(baseline.generate(2, steps=1)) == ['refined']
    for wrong, named in (
        (lambda: baseline.encode(x), 'no codes'),
        (lambda: model.generate(2, guidance=1.0), '--cond-drop'),
        (lambda: dv.load(tmp_path, form='2'), 'stage2-form2.pt'),
        (lambda: model.generate(2, sampler='x'), '--sampler x: not one of'),
    ):
        with pytest.raises(dv.UserError, match=named):
            wrong()


def test_sample_draws_the_averaged_weights_drafts_above_refined_images(trained):
    """Rows of drafts and of refined images in turn, 16 a row, doubled in size, behind a margin."""
    assert run('sample', '--out', trained, '--form', '2', '--steps', 2, '--num', 20) == 0
    sheet = np.asarray(Image.open(trained / 'sample-steps=2-form2.png'))
    assert sheet.shape == (16 + 2 * 4 * 33, 64 + 2 * 16 * 33, 3)
    model = dv.load(trained, form='2')
    saved = torch.load(trained / 'stage2-form2.pt', weights_only=True)
    model.model.load_state_dict(saved['ema'])
    drafts, refined = model.generate(20, steps=2).values()
    for row, images, i in ((0, drafts, 5), (1, refined, 5), (2, drafts, 18), (3, refined, 18)):
        y = 16 + 2 * 33 * row
        x = 64 + 2 * 33 * (i % 16)
        shown = torch.tensor(sheet[y : y + 64 : 2, x : x + 64 : 2]).permute(2, 0, 1)
        assert (shown - 255 * images[i]).abs().max() < 1
    x = torch.tensor([0.999, 0.5, 1.7, -1.0])
    assert dv.to_uint8(x).tolist() == [255, 128, 255, 0]  # rounded, not truncated


@pytest.fixture
def shown(monkeypatch):
    """{name: (labels, rows [n, C, H, W], columns)} of the pictures that commands draw."""
    pictures = {}

    def remember(self, name, rows, columns=()):
        labels, images = zip(*rows)
        pictures[name.split('-')[0]] = labels, images, columns

    monkeypatch.setattr(dv.Trained, 'write_picture', remember)
    return pictures


def test_png_folder_says_what_it_holds_and_is_restartable(trained):
    """Only a missing file is made again, as it was; other settings have another folder."""
    command = ['sample', '--out', trained, '--steps', 2, '--num', 66, '--png']
    assert run(*command) == 0
    folder = trained / 'sample-steps=2-form1-trained12'
    files = sorted(folder.glob('*/*.png'))
    assert len(files) == 132 and files[0].name == '000000.png'
    first = {path: path.read_bytes() for path in files}
    (folder / 'refined' / '000065.png').unlink()
    stamp = files[0].stat().st_mtime_ns
    assert run(*command) == 0
    assert {path: path.read_bytes() for path in files} == first
    assert files[0].stat().st_mtime_ns == stamp
    assert run(*command[:-3], '--num', 1, '--seed', 1, '--gmm', 2, '--png') == 0
    folder = trained / 'sample-gmm=2-seed=1-steps=2-form1-trained12'
    assert (folder / 'draft/000000.png').exists()


# ---- 9. What z controls --------------------------------------------------------------------------


def test_interpolation_starts_and_ends_at_the_reconstructions(trained, shown):
    """From the reconstruction of one image to another's, codes on the arc; the last row goes from
    the first one's noise to another, in every step."""
    how = ['--out', trained, '--steps', 2]
    assert run('reconstruct', *how, '--num', 2) == 0
    assert run('interpolate', *how, '--num', 5) == 0
    _, (images, draft, refined), _ = shown['reconstruct']
    _, (drafts, between, other), _ = shown['interpolate']
    assert torch.equal(images, load_images('shapes', train=False).batch([0, 1]))
    near = partial(torch.allclose, atol=1e-5)
    assert near(drafts[[0, 4]], draft) and near(between[[0, 4]], refined)

    model = dv.load(trained)
    mu, _ = model.encode(images)
    middle = model.decode(Own.slerp(mu[0], mu[1], 0.5)[None])
    assert near(drafts[2:3], middle) and not near(draft[:1], middle)
    noise = partial(torch.randn, 1, 3, 32, 32, generator=dv.make_generator(0, 'other noise'))
    options = dv.SamplingOptions(**dv.SAMPLING | dict(steps=2))
    last = model.paint(options, mu[:1], noise)['refined']
    assert near(other[[0, 4]], torch.cat([between[:1], last])) and not near(other[:1], last)


def test_chain_shows_both_processes_and_what_the_samplers_pass_through(trained, shown):
    """Forward: one noise at the chain's times, then the draft; reverse: DDIM's steps by hand."""
    how = ['--out', trained, '--steps', 4, '--sampler', 'ddim']
    assert run('chain', *how, '--form', '2') == 0
    names, _, _ = shown['chain']
    assert names == ('forward 1', 'forward 2', 'draft', 'form2', 'x_0_pred')
    assert run('chain', *how) == 0
    names, rows, columns = shown['chain']
    assert names[3:] == ('form1', 'x_0_pred', 'form2', 'x_0_pred', 'uncond', 'x_0_pred')

    # Columns are times from 0 to 0.8 T: those of four quadratic steps, (i / 3)^2 800 + 1.
    assert columns == ['0', '1', '90', '357', '801']
    alpha_bar = torch.cat([torch.ones(1), ALPHA_BAR[[0, 89, 356, 800]]]).view(-1, 1, 1, 1)

    # Forward: the image is at time 0, the noise is the same at all others, and N(0, I).
    forward_1, forward_2, draft, *reverse = [2 * images.double() - 1 for images in rows]
    x_0 = 2 * load_images('shapes', train=False).batch([0]).double() - 1
    eps = (forward_1 - alpha_bar**0.5 * x_0)[4] / (1 - alpha_bar[4]) ** 0.5
    assert 0.95 < eps.std() < 1.05
    assert torch.allclose(forward_1, Own.q_sample(x_0, alpha_bar, eps), atol=1e-5)
    drift = torch.cat([0 * draft[:1], draft[-1:].expand(4, -1, -1, -1)])
    assert torch.allclose(forward_2 - forward_1, drift, atol=1e-5)
    assert len(draft) == 5 and (draft[:-1] == 1).all()

    # Reverse: from right to left each x_t is DDIM's step towards the estimate below it; the same
    # noise for all models; time 0 is the refined image.
    for x_t, x_0_pred in zip(reverse[::2], reverse[1::2]):
        step = Own.ddim_step(x_t[1:], x_0_pred[1:], alpha_bar[1:], alpha_bar[:-1], 0)
        assert torch.allclose(x_t[:-1], step, atol=1e-3)
        assert torch.equal(x_t[-1], reverse[0][-1])
        assert torch.equal(x_0_pred[0], x_t[0])


def test_edit_moves_along_the_difference_of_mean_codes(trained, shown, capsys, monkeypatch):
    """Codes move from -2 to 2 times the mean of circles minus that of all others."""
    command = ['edit', '--out', trained, '--steps', 1, '--num', 5, '--attribute', 'circle']
    assert run(*command) == 0
    model = dv.load(trained)
    images = load_images('shapes')
    mu, _ = model.encode(images.batch(slice(None)))
    circle = images.attributes['circle']
    direction = mu[circle].mean(0) - mu[~circle].mean(0)
    codes, _ = model.encode(load_images('shapes', train=False).batch([0, 1, 2]))
    labels, rows, columns = shown['edit']
    assert labels == ('draft', 'refined') * 3 and columns[::4] == ['-2.0', '+2.0']
    for code, drafts in zip(codes, rows[::2]):
        z = torch.stack([code + strength * direction for strength in (-2, -1, 0, 1, 2)])
        assert torch.allclose(drafts, model.decode(z), atol=1e-5)
        assert not torch.allclose(drafts[0], drafts[4], atol=1e-4)

    # An attribute is a kind, or the upper half of a factor; there is no other.
    _, factors = dv.draw_shapes(20_000, dv.make_generator('shapes', True))
    assert torch.equal(circle, factors['kind'] == 1)
    assert torch.equal(images.attributes['x'], factors['x'] > 0.5)
    monkeypatch.setattr(dv, 'KINDS', (*dv.KINDS, 'square'))  # of which there is none
    for wrong in ('square', 'blue'):
        assert run(*command[:-1], wrong) == 2 and 'known: wide, ' in capsys.readouterr().err


def test_robust_damages_more_and_more(trained, monkeypatch, shown):
    """Along each row of `robust` the draft is farther from the first."""
    shape = dv.draw_shapes(1, dv.make_generator(0))[0] / 255  # a draft with edges
    monkeypatch.setattr(dv.VAE, 'decode', lambda self, z: shape.expand(len(z), -1, -1, -1))
    assert run('robust', '--out', trained, '--steps', 1, '--num', 4) == 0
    labels, rows, _ = shown['robust']
    assert labels[::2] == ('noise', 'blur', 'blocks')
    for damaged in rows[::2]:
        distance = [(image - shape).abs().mean().item() for image in damaged]
        assert distance == sorted(distance) and distance[0] < 0.001 < distance[3]


def test_general_y_and_guidance(tmp_path, shown):
    """--signal lowres: the VAE models y in both stages, the refiner x; reconstruct shows both."""
    command = ['train', '--out', tmp_path, '--steps', 10]
    assert run(*command, '--stage', 1, '--signal', 'lowres', *FEW) == 0
    assert run(*command, '--stage', 2, '--cond-drop', 0.5, *SMALL) == 0
    how = ['--out', tmp_path, '--steps', 2, '--num', 2, '--guidance', 1]
    assert run('reconstruct', *how) == 0
    labels, (x, y, *_), _ = shown['reconstruct']
    assert labels == ('image', 'y', 'draft', 'refined')
    assert torch.allclose(y[:, :, ::4, ::4], F.avg_pool2d(x, 4))


# ---- 10. Quality ---------------------------------------------------------------------------------


def test_distance_of_known_gaussians():
    """W_1(N(0, 1), N(0, s^2)) = |s - 1| sqrt(2 / pi) along each direction; and dim is farther than
    noise of the sample, also where a channel is black in all images."""
    real = randn(300, 2, 8, 8).float()
    again = randn(300, 2, 8, 8, seed=1).float()
    for s in (0.7, 1.5):
        expected = 1000 * abs(s - 1) * math.sqrt(2 / math.pi)
        assert dv.sliced_wasserstein(s * again, real)[0] == pytest.approx(expected, rel=0.08)
    assert dv.sliced_wasserstein(again, real)[0] < 60
    assert dv.sliced_wasserstein(real, real).tolist() == [0]

    green = load_images('shapes').batch(slice(100)) * tensor(0, 1, 0).view(3, 1, 1).float()
    halves = dv.sliced_wasserstein(green[:50], green[50:]).mean()
    dim = dv.sliced_wasserstein(0.8 * green[:50], green[50:]).mean()
    assert 0 < 1.2 * halves < dim


@pytest.mark.parametrize('R', [32, 47, 50])
def test_the_finest_level_of_the_pyramid_is_the_finest_detail(R):
    """Ramps have no fine detail, and a pattern of single pixels nothing else; the last level has 8
    to 15 pixels."""
    i = torch.arange(R, dtype=torch.float32)
    ramps = torch.stack([i.expand(R, R), i[:, None].expand(R, R), 2 * i - 3 * i[:, None]])
    detail, *_, last = dv.laplacian_pyramid(ramps[None])
    assert detail[..., 5:-5, 5:-5].abs().max() < 0.2  # half a pixel off would make it 0.5 and more
    pixels = (-1.0) ** (i + i[:, None])
    finest, *coarse = dv.laplacian_pyramid(pixels[None, None])
    assert finest.std() > 0.9 and all(level[..., 2:-2, 2:-2].std() < 0.1 for level in coarse)
    assert 8 <= last.shape[-1] < 16


def test_mixture_recovers_a_known_one(capsys):
    """6,000 draws give back weights, means and covariances; EM ends when it gains nothing."""
    share = torch.tensor([0.5, 0.3, 0.2]).double()
    means = torch.tensor([[0.0, 4.0], [4.0, 0.0], [-4.0, -4.0]]).double()
    covariances = covariance_matrices(3, 2, 5) / 4
    k = torch.multinomial(share, 6000, True, generator=torch.Generator().manual_seed(1))
    z = means[k] + (torch.linalg.cholesky(covariances)[k] @ randn(6000, 2, 1))[..., 0]
    mixture = dv.fit_mixture(z, 3, dv.make_generator(2))
    assert 2 <= int(re.findall(r'step (\d+) of EM', capsys.readouterr().out)[-1]) < 15
    order = [(mixture[1] - mean).square().sum(1).argmin().item() for mean in means]
    assert sorted(order) == [0, 1, 2]
    for found, truth, tolerance in zip(mixture, (share, means, covariances), (0.03, 0.1, 0.15)):
        assert torch.allclose(found[order], truth, atol=tolerance)
    share, _, _ = dv.fit_mixture(z[:5], 9, dv.make_generator(2))  # more components than points
    assert share.sum() == pytest.approx(1)


def test_ex_pde_draws_codes_from_a_mixture_fitted_to_codes(trained, monkeypatch, tmp_path):
    """--gmm K fits K components to codes of training images, once a VAE, and draws z from them."""
    weights = tensor(0.25, 0.75)
    means = 3 * randn(2, 4, seed=2)
    covariances = covariance_matrices(2, 4, 0)
    mixture = MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))
    fits = []

    def fit_mixture(z, K, generator):
        fits.append((z.shape, K))
        return weights, means, covariances

    monkeypatch.setattr(dv, 'fit_mixture', fit_mixture)
    trained = shutil.copytree(trained, tmp_path / 'copy', ignore=shutil.ignore_patterns('mixture*'))
    model = dv.load(trained)
    options = dv.SamplingOptions(**dv.SAMPLING | dict(gmm=2, num=60 * 64))
    painted = []
    monkeypatch.setattr(dv.Trained, 'paint', lambda self, options, z, noise: painted.append(z))
    for chunk in range(60):
        model.new_chunk(options, 64 * chunk)
    z = torch.cat(painted).double()
    assert fits == [((1000, 4), 2)]  # of the few shapes
    theirs = mixture.sample((10_000,))
    assert torch.allclose(z.mean(0), mixture.mean, atol=0.3)
    assert torch.allclose(z.T.cov(), theirs.T.cov(), atol=0.12 * theirs.T.cov().abs().max())
    assert abs(mixture.log_prob(z).mean() - mixture.log_prob(theirs).mean()) < 0.15

    # It is kept beside the checkpoint, for the same VAE only.
    for form in ('1', '2'):
        kept = dv.load(trained, form)
        kept.new_chunk(options, 64 * 59)
        assert torch.equal(painted.pop().double(), z[-64:])
    assert len(fits) == 1
    dv.mixture_of_codes.cache_clear()
    kept.vae.mu.weight.data *= 2
    kept.new_chunk(options, 0)
    assert len(fits) == 2

    # As --data may name another folder: a mixture of its images is refused.
    (trained / 'mixture2.pt').unlink()
    other = dv.replace(kept, facts=kept.facts | {'first': 255 - kept.facts['first']})
    with pytest.raises(dv.UserError, match='not the images of'):
        other.new_chunk(options, 0)


def test_evaluate_measures_every_model_with_the_same_sampler(trained, tmp_path, capsys):
    """The table has the floor, the drafts, and all models by steps; it takes what images there are,
    and no models of different images."""
    command = ['evaluate', '--out', trained, '--num', 12, '--steps', '1,2', '--sampler', 'ddim']
    assert run(*command) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    rows = {line[:34].strip(): re.findall(r'[\d.]+', line[34:]) for line in lines}
    forms = [f'{form} ddim quadratic, ' for form in ('form1', 'form2', 'uncond')]
    forms = {form + steps for form in forms for steps in ('1 steps', '2 steps')}
    assert set(rows) == {'floor: training images', 'form1 drafts', 'form2 drafts'} | forms
    for numbers in rows.values():
        mean, lowest, highest, *levels = map(float, numbers)
        assert lowest <= mean <= highest and len(levels) == 3
        assert np.mean(levels) == pytest.approx(mean, abs=0.2)
    assert float(rows['floor: training images'][0]) < float(rows['form1 drafts'][0])

    # First the baseline is of other images; then one of the forms was trained on another stage 1.
    mixed = shutil.copytree(trained, tmp_path / 'mixed')
    for name, said in (('uncond', 'of different images'), ('form2', 'have different VAEs')):
        saved = torch.load(mixed / f'stage2-{name}.pt', weights_only=True)
        if name == 'uncond':
            saved['images']['number'] += 1
        else:
            saved['ema']['vae.head.weight'] *= 1.01
        torch.save(saved, mixed / f'stage2-{name}.pt')
        for command in ('evaluate', 'chain'):
            assert run(command, '--steps', 1, '--out', mixed) == 2
            assert said in capsys.readouterr().err


# ---- 11. The command line ------------------------------------------------------------------------


def lecture(*args):
    """One of the lecturer's commands, see below, in process: its exit code."""
    return main([str(arg) for arg in args])


def test_bench_counts_the_flops_of_whole_runs(monkeypatch, capsys):
    """By hand: 2 k^2 c_in c_out a pixel of a convolution, three times that with the gradients of
    weights and inputs (no input's gradient for the stem); times images a step, times steps."""
    preset = {stage: dv.SMALL[stage] | dict(size=16, batch=6, steps=10**8) for stage in (1, 2)}
    monkeypatch.setattr(dv, 'PRESETS', {'small': preset, 'cifar10': preset})
    monkeypatch.setitem(dv.PAPER_VAES, 'cifar10', dv.vae_layout(config(1)))
    monkeypatch.setattr(sys.modules[__name__], 'BENCH_PRODUCT', 32)
    monkeypatch.setattr(sys.modules[__name__], 'BENCH_BATCH', 2)
    model = dv.build(config(1), 3)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    calls = [recorded(conv) for conv in convs]
    model(torch.rand(1, 3, 16, 16), torch.zeros(1, 8))
    flops = 0
    for conv, ((_, output),) in zip(convs, calls):
        flops += 2 * (2 if conv is model.stem else 3) * conv.weight.numel() * output[0, 0].numel()

    assert lecture('bench', '--tflops', 50, '--tflops-vae', 2) == 0
    out = capsys.readouterr().out
    assert out.count('training') == out.count('sampling') == 2
    projected = re.search('small +stage 1 (.*)', out)[1].split()
    total, hours = map(float, projected[:2])
    assert total == pytest.approx(flops * 6 * 10**8, rel=0.05)
    assert hours == pytest.approx(total / 2e12 / 3600, rel=0.05)  # the VAE is float32
    size = 4 * 4 * count(model)  # weights, averages, and Adam's two
    assert float(projected[2][:-1]) == pytest.approx(100 * size / 1e9 / 60, abs=0.05)


def test_grade_prints_the_report_alone(tmp_path, capfd, monkeypatch):
    """A line an exercise and the points, for code that prints, exits or kills, too; whatever the
    settings of the shell are."""
    skip_unless_all_are_solved()
    monkeypatch.setenv('FORCE_COLOR', '1')
    monkeypatch.setenv('PYTEST_ADDOPTS', '--tb=line')
    path = tmp_path / 'student.py'
    text = GRADED.read_text(encoding='utf-8')
    changes = {  # the first is wrong, the second prints, the third exits, the fourth is blank
        'torch.exp(logvar / 2) *': 'torch.exp(logvar) *',
        'return 0.5 * (mu**2': "print('a line of the student')\n    return 0.5 * (mu**2",
        'squared_error = (y - x_hat)': 'sys.exit()\n    squared_error = (y - x_hat)',
        'return torch.cumprod(': "raise NotImplementedError('Exercise 4')\n    torch.cumprod(",
    }
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text, encoding='utf-8-sig')  # with a byte-order mark, as Notepad does
    assert lecture('grade', path, '--only', '1,2,3,4') == 1
    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == ''
    assert lines[0].startswith('exercise  1 reparameterize   0 of 1  does not hold: mu = 1, sigma')
    assert lines[0].endswith(' This looks like: variance for standard deviation.')
    assert lines[1] == 'exercise  2 kl_divergence    3 of 3'
    said = 'exercise  3 negative_elbo    0 of 2  stops with SystemExit, line '
    assert lines[2].startswith(said) and ': sys.exit() (in a test of: ' in lines[2]
    assert lines[3] == 'exercise  4 linear_schedule  0 of 1  not solved yet'
    assert lines[4:] == ['student.py: 3 of 7 points']

    # A solution that ends the process leaves dots, and no report.
    dots = types.SimpleNamespace(stdout='..')
    monkeypatch.setattr(subprocess, 'run', lambda *args, **how: dots)
    assert lecture('grade', path) == 2
    assert 'cannot be graded: it ended the process' in capfd.readouterr().err


def test_the_readme_is_true(trained, tmp_path, monkeypatch):
    """Its lines of Python run as they stand; the CI's script ends in its command for the tests."""
    if not (HERE / 'README.md').exists():
        pytest.skip('no README beside this file')
    readme = (HERE / 'README.md').read_text(encoding='utf-8')
    commands = re.findall(r'```sh\n(.*?)```', readme, re.S)
    assert (HERE / '.ci/run').read_text(encoding='utf-8').endswith('\n' + commands[1])

    shutil.copytree(trained, tmp_path / 'runs' / 'shapes')
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r'```python\n(.*?)```', readme, re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {})


BAD = [
    (['train', '--stage', 1, '--data', 'nothing'], 'nothing'),
    (['train', '--stage', 1, '--steps', 0], '--steps 0: must be from 1'),
    (['train', '--stage', 1, '--lr', 'nan'], '--lr'),
    (['train', '--stage', 1, '--device', 'cuda:7'], '--device'),
    (['train', '--stage', 1, '--size', 40], '--size 40'),
    (['train', '--stage', 1, '--preset', 'cifar10', '--size', 64], '--size 64'),
    (['train', '--stage', 1, '--preset', 'celebahq128'], '--data'),
    (['train', '--stage', 2], '--stage 1'),
    (['train', '--stage', 2, '--form', 'uncond', '--multipliers', '0,2'], '(0, 2): must be'),
    (['train', '--stage', 2, '--form', 'uncond', '--multipliers', '1,1,1,1,1,1,1'], '--multip'),
    (['train', '--stage', 2, '--form', 'uncond', '--heads', 5], '--heads'),
    (['train', '--stage', 2, '--form', 'uncond', '--attention', 7], '--attention'),
    (['train', '--stage', 2, '--form', 'uncond', '--channels', 144], '--channels'),
    (['sample', '--steps', 1001], '--steps 1001: must be from 1 to 1000'),
    (['sample'], 'train --stage 2'),
    (['paint'], 'paint'),
]


@pytest.mark.parametrize('command, named', BAD, ids=lambda value: ' '.join(map(str, value))[-50:])
def test_bad_input_is_one_line_and_exit_code_2(command, named, tmp_path, capsys, monkeypatch):
    """What is wrong is named in one line, before pictures are read; no checkpoint is written."""
    monkeypatch.chdir(tmp_path)
    assert run(*command) == 2
    message = capsys.readouterr().err
    assert message.count('\n') == 1 and message.startswith('error: ') and named in message
    assert not list(tmp_path.rglob('*.pt'))


def test_bad_files_are_one_line_and_exit_code_2(trained, tmp_path, capsys, monkeypatch):
    """Empty, junk, damaged, with code, unwritable, too large: named, and nothing is overwritten."""

    def fails(named, *command):
        capsys.readouterr()
        assert run(*command) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith('error: ') and named in message
        return message

    def raises(error, *args, **more):
        raise error

    monkeypatch.setattr(urllib.request, 'urlopen', partial(raises, OSError('no network')))
    missing = ['--data', 'mnist', '--root', tmp_path, '--out', tmp_path / 'o']
    fails('--data mnist', 'train', '--stage', 1, *missing)

    # Checkpoints. A pickle's code is never run.
    copied = shutil.copytree(trained, tmp_path / 'copy')
    path = copied / 'stage2-form1.pt'
    good = path.read_bytes()
    evil = pickle.dumps(partial(Path.touch, tmp_path / 'evil'), protocol=2)
    torch.save({'settings': {}, 'images': {}}, path)
    for damaged in (b'', b'junk', good[: len(good) // 2], good[:-20], evil, path.read_bytes()):
        path.write_bytes(damaged)
        fails('stage2-form1.pt', 'sample', '--out', copied)
        fails('stage2-form1.pt', 'train', '--stage', 2, '--out', copied)
        assert path.read_bytes() == damaged
    assert not (tmp_path / 'evil').exists()

    (tmp_path / 'file').write_text('a file, not a folder')
    fails('file', 'train', '--stage', 1, '--out', tmp_path / 'file' / 'run', *FEW)
    error = torch.OutOfMemoryError('CUDA out of memory.\nTried to allocate 20 GiB.')
    monkeypatch.setattr(dv.Trained, 'paint', partial(raises, error))
    assert '--parts' not in fails('GiB.', 'sample', '--out', trained)
    command = ['train', '--stage', 2, '--form', '2', '--steps', 13]
    fails('GiB.; train --parts 2, or more', *command, '--out', copied)


@pytest.mark.parametrize('error', [RuntimeError, ValueError, KeyError, NotImplementedError])
def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch, error):
    """An error in the method's own code, as a student makes it, is not taken for the user's."""

    def kl_divergence(mu, logvar):
        raise error('a bug in this line')

    monkeypatch.setattr(dv, 'kl_divergence', kl_divergence)
    with pytest.raises(error, match='a bug in this line') as caught:
        run('train', '--stage', 1, '--steps', 1, '--out', tmp_path, *FEW)
    assert caught.traceback[-1].name == 'kl_divergence'


def test_commands_as_processes(tmp_path, monkeypatch):
    """Stage 1, killed and resumed; stage 2 by two processes: each equals one whole run."""

    def start(*args, threads='2', **environment):  # as here: sums are rounded in the same order
        command = [sys.executable, dv.__file__, *map(str, args)]
        environment = os.environ | {'OMP_NUM_THREADS': threads, **environment}
        environment |= {'PYTHONIOENCODING': 'ascii'}  # a console that lacks letters of the folder
        pipe = subprocess.PIPE
        return subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe, env=environment)

    skip_unless_all_are_solved()
    monkeypatch.chdir(tmp_path)
    for i in range(30):  # a process would draw 22,000 shapes, for seconds
        picture(tmp_path / f'é/{i}.png', colour=(8 * i, 250 - 8 * i, 40))
    stage1 = ['train', '--stage', 1, '--data', 'é', '--steps', 20, '--batch', 4]
    stage2 = ['train', '--stage', 2, '--data', 'é', '--steps', 6, *SMALL]
    stage2 += ['--clip', 0.5, '--ema', 0.9]

    # Stage 1: killed as soon as there is a checkpoint, which is whole, and the run resumes from it.
    # (One after the other: side by side processes take four times as long.)
    assert run(*stage1, '--out', 'whole') == 0 and run(*stage2, '--out', 'whole') == 0
    killed = start(*stage1, '--save-every', 0)
    lines = [killed.stdout.readline() for _ in range(2)]
    assert 'squared_error' in lines[1] and 'min left' in lines[1] and '\r' not in lines[1]
    path = tmp_path / 'runs/é/stage1.pt'
    while not path.exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert 10 <= torch.load(path, weights_only=True)['step'] <= 20
    assert run(*stage1) == 0
    assert contents(path) == contents(Path('whole/stage1.pt'))

    # Stage 2 by two processes, in an environment like torchrun's: equal but for rounding.
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    torchrun = dict(TORCHELASTIC_RUN_ID='x', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1')
    torchrun |= dict(MASTER_PORT=port, threads='1')
    both = [start(*stage2, **torchrun, RANK=rank, LOCAL_RANK=rank) for rank in '01']
    output = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], output
    assert output[0][0].count('min left') == 1 and output[1][0] == ''  # the first one reports
    by_two = torch.load('runs/é/stage2-form1.pt', weights_only=True)
    by_one = torch.load('whole/stage2-form1.pt', weights_only=True)
    for part in ('model', 'ema'):
        for name, value in by_one[part].items():
            assert torch.allclose(by_two[part][name], value, rtol=0, atol=1e-5)


def test_the_first_process_loads_for_all_and_if_it_fails_none_waits(tmp_path):
    """When the first finds no data, torchrun ends the second, which waits for it at a barrier and
    has not looked for data."""
    skip_unless_all_are_solved()
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command += [dv.__file__, 'train', '--stage', '1', '--data', 'nothing', '--out', 'run']
    how = dict(cwd=tmp_path, timeout=60, env=os.environ | {'OMP_NUM_THREADS': '1'})
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert done.returncode == 1 and done.stderr.count('nor a folder') == 1


def test_a_step_in_parts_is_the_same_step(trained, tmp_path, capsys, monkeypatch):
    """Three parts one after the other: the same weights but for rounding, in both stages."""
    for stage, few in ((1, FEW), (2, SMALL)):
        found = []
        for parts in (1, 3):
            out = shutil.copytree(trained, tmp_path / f'{stage}-{parts}')
            name = 'stage1.pt' if stage == 1 else 'stage2-form1.pt'
            (out / name).unlink()
            more = ['--clip', 'inf', '--steps', 3, '--parts', parts]
            assert run('train', '--stage', stage, '--out', out, *few, '--batch', 6, *more) == 0
            saved = torch.load(out / name, weights_only=True)
            moments = {i: state['exp_avg'] for i, state in saved['optimizer']['state'].items()}
            found.append(saved['model'] | moments)  # Adam's steps alone forget the gradient's size
            line = capsys.readouterr().out.splitlines()[-2]
            found.append(float(re.search(r' loss ([\d.e-]+)', line)[1]))
        whole, loss, in_parts, loss_of_parts = found
        assert loss_of_parts == pytest.approx(loss, rel=1e-3)
        for name, value in whole.items():
            assert torch.allclose(in_parts[name], value, rtol=1e-3, atol=2e-5), name
    monkeypatch.setattr(dv, 'WORLD', 2)
    assert run('train', '--stage', 1, '--out', tmp_path / 'odd', '--batch', 6, '--parts', 2) == 2
    assert '2 processes times 2 --parts' in capsys.readouterr().err


# ==== THE LECTURER'S COMMANDS: a file for students, and the speed of this machine =================

HEADER = """\
# EXERCISES. In this copy of diffusevae.py the bodies of these functions are missing (with points):
#
{list}
#
# You learn to get from a bound, a Gaussian or Bayes' rule to code that trains. You should know
# Python, some torch, and these three. It takes some three hours. Read from the top; where you
# come to an EXERCISE, derive on paper what its comment states or asks, then replace the line with
# NotImplementedError. Leave name and arguments as they are, and do not change what you are given
# (but the averages of 13). alpha_bar may be a tensor or a float: `alpha_bar**0.5` works for both.
#
# Any order will do: each is graded by itself, with right formulas in place of all the others. With
# this file as diffusevae.py beside test_diffusevae.py (--only 5 grades one):
#
#     python test_diffusevae.py grade diffusevae.py
#
# Milestones: with 1, 2, 3 and 13 `python diffusevae.py train --stage 1` runs, and draws your VAE's
# drafts; with 4 to 8 and 10 to 12 `train --stage 2` and `sample`; with 9 `sample --sampler ddim`,
# with 14 `interpolate`, with 15 `sample --gmm 20`.
#
# An exercise has all of its points or none. The tests hold each formula once more, NOTES.md derives
# them, and the original is public: who looks there first learns less, and will be asked why.
"""


ANSWERS = {'q_sample': r'\n# +hence q\(.*', 'network_input': r"\n#\n# Let x_t := x'(.|\n#)*"}


def blanked(source, numbers, formulas):
    """The text of a file with the bodies of some exercises replaced by an error, and a header.

    The docstring stays, after number and points of the exercise, and so does the comment between
    it and the first statement. Where the formula can be derived, a question takes its place,
    unless `formulas` are wanted.
    """
    # Two banners, too, say what exercise 5 asks for, and one what 12 does.
    for name, answer in ANSWERS.items():
        if EXERCISES[name].number in numbers and not formulas:
            source = re.sub(answer, '', source)
    lines = source.splitlines()

    # From the end of the file, so that the line numbers of what is still to come stay right.
    for node in reversed(ast.parse(source).body):
        if not isinstance(node, ast.FunctionDef) or node.name not in EXERCISES:
            continue
        number = EXERCISES[node.name].number
        if number in numbers:
            first = node.body[1].lineno - 1
            error = f"    raise NotImplementedError('Exercise {number}: {node.name}')"
            lines[first : node.end_lineno] = [error]
            question = inspect.getdoc(EXERCISES[node.name])
            if question and not formulas:
                asked = textwrap.wrap(question, 94)
                lines[node.body[0].end_lineno : first] = [f'    # {line}' for line in asked]

            # The docstring, in a paragraph of its own after number and points.
            start = node.body[0].lineno - 1
            text = lines[start].removeprefix('    """').removesuffix('"""')
            points = EXERCISES[node.name].points
            above = [f'    """EXERCISE {number}, points: {points}.', '', f'    {text}']
            if node.body[0].lineno == node.body[0].end_lineno:  # it had one line
                above.append('    """')
            lines[start : start + 1] = above

    exercises = [
        f'#   {cls.number:2}  {name:15} {cls.points}'
        for name, cls in EXERCISES.items()
        if cls.number in numbers
    ]
    return '\n'.join([HEADER.format(list='\n'.join(exercises)), *lines]) + '\n'


def chosen_numbers(only):
    """The numbers of --only, or all of them. UserError for a number that there is not."""
    known = [cls.number for cls in EXERCISES.values()]
    if not set(only) <= set(known):
        raise dv.UserError(f'--only {only}: exercises have numbers from 1 to {len(known)}')
    return only or known


def write_exercise(path, only, formulas):
    """Write the file for a student; `only` has the numbers of the exercises to blank, () is all."""
    chosen = chosen_numbers(only)
    if path.exists():
        raise dv.UserError(f'--out {path}: exists already; move it, or name another file')
    text = blanked(GRADED.read_text(encoding='utf-8'), chosen, formulas)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8', newline='\n')
    print(f'{path}: fill it in, and grade it with: python test_diffusevae.py grade {path}')


# ---- python test_diffusevae.py grade -------------------------------------------------------------


def grade_file(path, only):
    """Print the report on a file, a line an exercise. Returns 0 if all are solved, else 1.

    only: numbers of the exercises that count, () is all. UserError for a file that is not Python,
    or that never gets as far as a report.
    """
    chosen = chosen_numbers(only)
    try:
        ast.parse(path.read_bytes())  # as bytes: Notepad writes a byte-order mark
    except (SyntaxError, ValueError) as error:
        raise dv.UserError(f'{path}: {type(error).__name__}: {error}') from error

    # The tests of the exercises, in a process of their own, which may print, hang or exit.
    here = Path(__file__).resolve()
    classes = [f'{here}::{cls.__name__}' for cls in EXERCISES.values() if cls.number in chosen]
    how = '-m pytest -q --tb=short --color=no -p no:cacheprovider'
    command = [sys.executable, *how.split(), *classes]
    # What is printed is read below: so it must not depend on the user's settings of pytest.
    environment = os.environ | {'DIFFUSEVAE': str(path.resolve()), 'PYTEST_ADDOPTS': ''}
    how = dict(capture_output=True, text=True, timeout=GRADE_LIMIT)
    try:
        done = subprocess.run(command, env=environment, **how)
    except subprocess.TimeoutExpired as error:
        raise dv.UserError(f'{path}: took longer than {GRADE_LIMIT} seconds') from error

    lines = done.stdout.splitlines()
    if not any(re.fullmatch(r'.*: \d+ of \d+ points', line) for line in lines):
        said = [line for line in lines if line.startswith('E ')] or ['E it ended the process']
        raise dv.UserError(f'{path}: cannot be graded: {said[-1][1:].strip()}')
    total = 0
    possible = 0
    for line in lines:
        found = re.match(r'exercise +(\d+) \S+ +(\d+) of (\d+)', line)
        if found and int(found[1]) in chosen:
            print(line)
            total += int(found[2])
            possible += int(found[3])
    print(f'{path.name}: {total} of {possible} points')
    return 0 if total == possible else 1


# ---- python test_diffusevae.py bench -------------------------------------------------------------

BENCH_BATCH = 16
BENCH_PRODUCT = 4096  # rows and columns
BENCH_IMAGES = dict(cifar10=50_000, celeba64=162_770, celebahq128=28_500, celebahq256=28_500)


def bench_setup(preset, stage, device, **changes):
    """The settings of a preset, its model, and the inputs of a training step on black images."""
    settings = config(stage, preset=preset, **changes)
    if stage == 2:
        settings.vae = dataclasses.asdict(config(1, preset=preset))
    images = dv.Images(torch.zeros(1, 3, settings.size, settings.size, dtype=torch.uint8), {})
    model = dv.place(dv.build(settings, 3), device)
    return settings, model, dv.training_inputs(model, images, settings, 0, device)


def count_flops(work):
    """The floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def measure(work):
    """Seconds of a call, the fastest of five, and its TFLOP/s; `item` waits for the device."""
    seconds = min(timeit.repeat(lambda: work().sum().item(), number=1, repeat=5))
    return seconds, count_flops(work) / seconds / 1e12


def bench_speed(device_name):
    """Print the speed of two networks as a share of the device's own."""
    device = dv.choose_device(device_name)
    print('A step: images/s, TFLOP/s, share of what a large product reaches')
    dtype = torch.bfloat16 if dv.has_fast_bfloat16(device) else torch.float32
    for preset in ('small', 'cifar10'):
        _, model, inputs = bench_setup(preset, 2, device, batch=BENCH_BATCH)
        optimizer = torch.optim.Adam(model.unet.parameters(), fused=True)
        square = torch.randn(BENCH_PRODUCT, BENCH_PRODUCT, device=device, dtype=dtype)

        def training(model=model, inputs=inputs, optimizer=optimizer):
            loss = model(**inputs)['loss']
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        def sampling(model=model, inputs=inputs):
            model.eval()
            how = dict(steps=1, sampler='ddim', spacing='uniform')
            return model.generate(inputs['eps_z'], inputs['eps'], lambda: 0, **how)['refined']

        _, peak = measure(partial(torch.matmul, square, square))
        for work in (training, sampling):
            seconds, rate = measure(work)
            speed = f'{BENCH_BATCH / seconds:9.1f} {rate:9.3f} {rate / peak:9.0%}'
            print(f'{preset:8} {str(dtype)[6:]:8} {work.__name__} {speed}')


def bench_run(preset, stage):
    """FLOPs of a whole run, and the VAE's share; FLOPs and bytes to save it once, and how often."""
    meta = torch.device('meta')
    settings, model, inputs = bench_setup(preset, stage, meta)
    steps = settings.steps or settings.epochs * BENCH_IMAGES[preset] // settings.batch
    total = steps * count_flops(lambda: model(**inputs)['loss'].backward())
    of_vae = total
    of_picture = 0
    if stage == 2:  # whose picture takes 50 calls for 16 images
        of_vae = steps * count_flops(lambda: model.vae(inputs['x'], inputs['eps_z']))
        condition = model.condition(inputs['x'], inputs['eps_z'])
        call = count_flops(lambda: model.eps_theta(inputs['x'], inputs['t'], **condition))
        of_picture = 50 * 16 * call / settings.batch
    moments = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # Adam's
    size = 4 * (2 * count(model) + moments)
    return total, of_vae, of_picture, size, settings.save_every


def bench_projection(tflops, tflops_vae):
    """Print what each preset's whole runs cost; nothing is computed."""
    print('\nA projection: FLOPs of a whole run; its hours, without saving; the share of time that')
    print('saving adds, at 1 GB/s, with its pictures')
    for preset, stage in itertools.product(dv.PRESETS, (1, 2)):
        total, of_vae, of_picture, size, save_every = bench_run(preset, stage)
        hours = (of_vae / tflops_vae + (total - of_vae) / tflops) / 1e12 / 3600
        saving = (size / 1e9 + of_picture / tflops / 1e12) / save_every
        print(f'{preset:12} stage {stage} {total:9.1e} {hours:9.1f} {saving:9.1%}')


def parse(arguments):
    """The options of one of the lecturer's commands."""
    parser = dv.Parser('test_diffusevae.py', description="The lecturer's commands.")
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    only = dict(type=dv.whole_numbers, default=(), help='exercises, 1,2,5; default: all')
    sub = commands.add_parser('exercise', help='write a copy for a student, with bodies blanked')
    sub.add_argument('-o', '--out', type=Path, default='student.py', help='default: student.py')
    sub.add_argument('--only', **only)
    sub.add_argument('--formulas', action='store_true', help='leave those in that can be derived')
    sub.add_argument('--list', action='store_true', help='print the exercises and their points')

    sub = commands.add_parser('grade', help="what a student's file solves, and its points")
    sub.add_argument('file', type=Path, help='the file to grade, e.g. student.py')
    sub.add_argument('--only', **only)

    sub = commands.add_parser('bench', help="two networks' speed, and costs of the presets")
    sub.add_argument('--device', help='cpu, cuda, cuda:1, mps; default: cuda if there is one')
    sub.add_argument('--tflops', type=float, default=50.0, help='of the U-Net (default 50)')
    sub.add_argument('--tflops-vae', type=float, default=20.0, help='in float32 (default 20)')
    return parser.parse_args(arguments)


def main(arguments=None):
    """Run one of the lecturer's commands; returns the exit code."""
    try:
        options = parse(arguments)
        if options.command == 'bench':
            bench_speed(options.device)
            bench_projection(options.tflops, options.tflops_vae)
        elif options.command == 'grade':
            return grade_file(options.file, options.only)
        elif options.list:
            for name, cls in EXERCISES.items():
                print(f'{cls.number:2}  {name:15} {cls.points}')
        else:
            write_exercise(options.out, options.only, options.formulas)
    except (dv.UserError, OSError) as error:
        print('error:', ' '.join(str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
