"""DiffuseVAE in one file: a VAE drafts an image, a diffusion model refines the draft.

To be read from top to bottom beside the paper: Pandey, Mukherjee, Rai, Kumar, "DiffuseVAE:
Efficient, Controllable and High-Fidelity Generation from Low-Dimensional Latents", TMLR 2022,
arXiv 2201.00308. This is not the authors' code. NOTES.md derives what is only stated here.

    z ~ N(0, I) ---> VAE decoder ---> x_hat, a blurry draft
                                        |
                                        v  as extra input channels
    pure noise --------------------> U-Net, a few steps back in time ---> x_0, a sharp image

A VAE draws from a small code z that can be edited and interpolated, but its images are blurry. A
diffusion model paints sharp detail, but slowly, and its only code is noise as large as the image.
Here z settles what is where, and the diffusion model adds the detail that the draft lacks; as the
layout is given, few steps are enough.

    python diffusevae.py train --stage 1    # the VAE, into runs/shapes/stage1.pt
    python diffusevae.py train --stage 2    # the diffusion model, on the drafts of that VAE
    python diffusevae.py sample             # drafts above refined images, as a PNG

    Part 1  The method           1 the VAE, 2 diffusion, 3 the U-Net, 4 the two-stage model
    Part 2  Running it           5 data, 6 settings, 7 training, 8 sampling
    Part 3  The paper's claims   9 what z controls, 10 quality, 11 the command line
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps
from torch.distributions import MultivariateNormal, Normal
from torchvision import datasets, utils
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor, to_pil_image


class UserError(Exception):
    """An error that the user can fix, in an argument, a file or a folder: `main` prints one line.

    An error of another kind is a bug, and keeps its traceback.
    """


# ==== PART 1: THE METHOD ==========================================================================
#
# Tensors go in and tensors come out; files and data sets come later. Whoever stops after this part
# has seen the model, both losses and the sampler.
#
# Symbols:
#   B, C, H, W    images in a batch, channels, height, width
#   x, x_0        an image in [0, 1], as the VAE sees it, and the same image in [-1, 1], as the
#                 diffusion model sees it: x_0 = 2 x - 1
#   z             the code of an image: z_dim numbers; mu and sigma^2 = exp(logvar) are mean and
#                 variance of the codes that may have made an image
#   y             what the VAE models of an image: usually the image itself
#   x_hat         the VAE's draft of y. The VAE makes it in [0, 1]; the diffusion model is shown it
#                 in [-1, 1]. Where both meet, in section 4, the one in [0, 1] is called `draft`
#   alpha         the weight of the KL in the VAE's loss; it has nothing to do with alpha_bar
#   t, T          time, 1 ... T in formulas and 0 ... T - 1 in code; at T hardly anything but noise
#                 is left
#   x_t, y_t      the image noised to time t, and the same without the draft that Formulation 2 adds
#                 to it (section 2); y_t has nothing to do with y
#   beta_t        variance of the noise that is added from time t - 1 to time t
#   alpha_bar_t   (1 - beta_1) ... (1 - beta_t), the share of the image's power left at time t
#   eps           noise ~ N(0, I); eps_theta is the U-Net's estimate of it

# ==== 1. THE VAE, which draws the drafts ==========================================================
#
# The decoder turns a code z ~ N(0, I) into a draft: the mean x_hat(z) of a Gaussian p(y|z). The
# encoder says which codes may have made an image: q(z|x_0) = N(mu, diag sigma^2). Usually y is the
# image itself, but it may be a grey, a coarse or a masked version. The method rests on one lower
# bound (NOTES 2.1):
#
#     log p(x_0, y) >= E_q(z|x_0)[ log p(y|z) ] - KL( q(z|x_0) || p(z) )
#         + E_q(z|x_0) E_q(x_1:T|x_0, x_hat)[ log p(x_0:T|x_hat) - log q(x_1:T|x_0, x_hat) ]
#
# Three remarks beside the paper. It writes q(z|y, x_0); but y is a function of x_0. Its second line
# is conditioned on y and z; but a diffusion model that is shown y, where y is the image itself, is
# shown the answer. Ours sees only the draft x_hat(z) (and z, if asked to). Last, the left side is
# the density of x_0 and y together: where y is the image, the image counts twice, once as drafted
# and once as refined. NOTES 2.7 has a bound on log p(x_0) alone.
#
# Stage 1 trains the VAE on the first line. Stage 2 freezes the VAE and trains the diffusion model
# on the second line, with other weights for its terms (`ddpm_loss`).


def reparameterize(mu, logvar, eps):
    """Draw z ~ N(mu, sigma^2) such that gradients reach mu and logvar = log sigma^2.

    mu, logvar, eps: [B, z_dim], where eps ~ N(0, I). Returns z: [B, z_dim].
    """
    # z = mu + sigma * eps,  sigma = exp(logvar / 2)
    #
    # The expectation over q(z|x) is estimated by one sample. Drawn directly, the sample would not
    # be a function of mu and sigma that one can differentiate. Written like this, all randomness
    # sits in eps, which has no parameters: dz/dmu = 1 and dz/dsigma = eps.
    return mu + torch.exp(logvar / 2) * eps


def kl_divergence(mu, logvar):
    """KL( N(mu, sigma^2) || N(0, I) ) of each example, in nats: [B, z_dim] -> [B]."""
    # KL = 1/2 sum_j (mu_j^2 + sigma_j^2 - 1 - log sigma_j^2)
    #
    # It is E_q[log q(z) - log p(z)]. The logarithms are quadratic in z, so only the moments
    # E_q[z^2] = mu^2 + sigma^2 and E_q[(z - mu)^2 / sigma^2] = 1 are needed (NOTES 2.2).
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(dim=1)


def negative_elbo(x, x_hat, mu, logvar, alpha=1.0):
    """The loss of stage 1 and its two parts, each a mean over the batch.

    x: what is to be drafted, that is y, and x_hat, its draft: [B, C, H, W] in [0, 1]; mu, logvar:
    [B, z_dim]; alpha > 0 weighs the KL. Returns (loss, squared error, KL): tensors of shape [], the
    KL in nats.
    """
    # loss = ||x - x_hat||^2 + alpha KL( q(z|x) || p(z) )
    #
    # The error is a sum over pixels, the KL a sum over the numbers of z. A decoder N(x_hat,
    # sigma_x^2 I) has -log p(x|z) = ||x - x_hat||^2 / (2 sigma_x^2) + const. Multiply the negative
    # bound, -log p(x|z) + KL, by alpha := 2 sigma_x^2: up to a constant it becomes this loss. So
    # the paper's alpha = 1 is a decoder with sigma_x^2 = 1/2, and a smaller alpha is one that is
    # surer of its pixels.
    squared_error = (x - x_hat).square().sum(dim=(1, 2, 3)).mean()
    kl = kl_divergence(mu, logvar).mean()
    return squared_error + alpha * kl, squared_error, kl


class VAEBlock(nn.Module):
    """A residual bottleneck without normalisation: [B, width, R, R] -> the same shape.

    GELU and a convolution, four times: 1x1 to half the width, twice 3x3 (where there is more than
    one pixel), and 1x1 back. Biases start at zero, as in the authors' code.
    """

    def __init__(self, width, resolution):
        super().__init__()
        half = width // 2
        kernel = 3 if resolution > 1 else 1  # a single pixel has no neighbours
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(width, half, 1),
                nn.Conv2d(half, half, kernel, padding=kernel // 2),
                nn.Conv2d(half, half, kernel, padding=kernel // 2),
                nn.Conv2d(half, width, 1),
            ]
        )
        for conv in self.convs:
            nn.init.zeros_(conv.bias)

    def forward(self, h):
        branch = h
        for conv in self.convs:
            branch = conv(F.gelu(branch))
        return h + branch


def backbone(blocks, widths):
    """Residual blocks, changing resolution in between: most layers of the encoder or the decoder.

    blocks: how many at each resolution, in the order of the layers. {1: 1, 4: 2, ..., 32: 15} goes
    up. {32: 7, 16: 4, ..., 1: 3} goes down, and there each pooling has a block of its own before
    it, which is not counted: 8 blocks at 32, 5 at 16, ..., 3 at 1.
    widths: channels, e.g. {32: 64, ..., 1: 512}. Source: the authors' code.
    """
    layers = []
    for resolution, following in pairwise(blocks):  # each resolution, and the one after it
        if max(resolution, following) % min(resolution, following):
            raise UserError(f'resolutions {resolution} and {following}: not multiples')
        for _ in range(blocks[resolution]):
            layers.append(VAEBlock(widths[resolution], resolution))

        # Down: the additional block, then each square of pixels becomes its mean. Up: each pixel
        # becomes a square of equal pixels.
        if following < resolution:
            layers.append(VAEBlock(widths[resolution], resolution))
            layers.append(nn.AvgPool2d(resolution // following))
        else:
            layers.append(nn.Upsample(scale_factor=following // resolution))

        # A 1x1 convolution to the next resolution's width, as in the authors' code: also where the
        # widths are equal.
        layers.append(nn.Conv2d(widths[resolution], widths[following], 1, bias=False))

    last = list(blocks)[-1]
    for _ in range(blocks[last]):
        layers.append(VAEBlock(widths[last], last))
    return nn.Sequential(*layers)


def whole_image(x):
    """The usual y, what the VAE models of an image x [B, C, H, W]: the image itself."""
    return x


def grey(x):
    """y without colours: every channel is replaced by the mean of all."""
    return x.mean(dim=1, keepdim=True).expand_as(x)


def low_resolution(x):
    """y in squares of 4x4 pixels, each of one colour."""
    return F.interpolate(F.avg_pool2d(x, 4), scale_factor=4)


def masked(x):
    """y with the middle of the image, half its height and width, black."""
    border = x.shape[3] // 4
    y = x.clone()
    y[:, :, border:-border, border:-border] = 0
    return y


SIGNALS = {'image': whole_image, 'grey': grey, 'lowres': low_resolution, 'masked': masked}


class VAE(nn.Module):
    """The paper's VAE for images [B, C, size, size] in [0, 1]; `forward` is the loss of stage 1.

    encoder, decoder: blocks by resolution, from `size` down to 1 and back up; widths: channels by
    resolution; z has widths[1] numbers. alpha: weight of the KL. signal: a name in SIGNALS.
    """

    metrics = ('loss', 'squared_error', 'kl')  # what `forward` returns

    def __init__(self, channels, size, encoder, decoder, widths, alpha=1.0, signal='image'):
        super().__init__()
        if max(encoder) != size or max(decoder) != size or min(encoder) != 1 or min(decoder) != 1:
            raise UserError(f'{size=}: the encoder must go from it to 1, the decoder back to it')
        if signal not in SIGNALS:
            raise UserError(f'{signal=}: must be one of {", ".join(SIGNALS)}')
        self.z_dim = widths[1]
        self.alpha = alpha
        self.signal = SIGNALS[signal]

        # The encoder sees y minus the mean colour of the training set, and the last bias starts at
        # that colour's logit. Both are set when training begins (section 7), and are additions to
        # the paper: where most pixels are black, or white, the VAE died without (NOTES 4).
        self.register_buffer('mean_colour', torch.zeros(channels, 1, 1))

        self.stem = nn.Conv2d(channels, widths[size], 3, padding=1, bias=False)
        self.encoder = backbone(encoder, widths)
        self.mu = nn.Conv2d(self.z_dim, self.z_dim, 1, bias=False)
        self.logvar = nn.Conv2d(self.z_dim, self.z_dim, 1, bias=False)
        self.decoder = backbone(decoder, widths)
        self.head = nn.Conv2d(widths[size], channels, 3, padding=1)

    def encode(self, x):
        """q(z|x): x [B, C, H, W] in [0, 1] -> mu and logvar, each [B, z_dim].

        It looks only at y. So a picture of which only the grey version is known has a code, too:
        the y of a y is itself, for all SIGNALS.
        """
        y = self.signal(x) - self.mean_colour
        h = self.encoder(self.stem(y))  # [B, z_dim, 1, 1]
        mu = rearrange(self.mu(h), 'b z 1 1 -> b z')
        logvar = rearrange(self.logvar(h), 'b z 1 1 -> b z')
        return mu, logvar

    def decode(self, z):
        """The draft, the mean of p(y|z): [B, z_dim] -> [B, C, H, W] in [0, 1]."""
        h = self.decoder(rearrange(z, 'b z -> b z 1 1'))
        return torch.sigmoid(self.head(h))

    def random_inputs(self, n, generator):
        """The noise of a training step on n images: {'eps_z': [n, z_dim]}.

        It is not drawn in `forward`, because training gives each step a random generator of its own
        (section 7): a run that was interrupted then goes on with the same noise.
        """
        return {'eps_z': torch.randn(n, self.z_dim, generator=generator)}

    def forward(self, x, eps_z):
        """What `negative_elbo` returns for images x [B, C, H, W] in [0, 1]; eps_z: [B, z_dim]."""
        mu, logvar = self.encode(x)
        z = reparameterize(mu, logvar, eps_z)
        x_hat = self.decode(z)
        return negative_elbo(self.signal(x), x_hat, mu, logvar, self.alpha)


# ==== 2. FORWARD AND REVERSE DIFFUSION, written once for both formulations and the baseline =======
#
# The forward process adds a little noise in each of T steps. In Formulation 1 it ignores the draft:
#
#     q(x_t|x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)
#     hence q(x_t|x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)
#
# In Formulation 2 it carries the draft along, so that at T the draft plus noise is left:
#
#     q(x_1|x_0, x_hat)     = N(sqrt(1 - beta_1) x_0 + x_hat, beta_1 I)
#     q(x_t|x_{t-1}, x_hat) = N(sqrt(1 - beta_t) x_{t-1} + (1 - sqrt(1 - beta_t)) x_hat, beta_t I)
#     hence q(x_t|x_0, x_hat) = N(sqrt(alpha_bar_t) x_0 + x_hat, (1 - alpha_bar_t) I)
#
# Now subtract the draft: let y_t := x_t - x_hat for t >= 1. But y_0 := x_0, not x_0 - x_hat, which
# is why the first step above has a rule of its own. Then y_t follows Formulation 1's process
# exactly, so functions of y_t serve both (NOTES 2.6). A chain in y ends in y_0 = x_0, the image: no
# draft is to be added, as in a residual model, nor subtracted after the last step, as in the
# authors' code, whose chain is in x. For Formulation 1 and for the baseline without drafts let
# y_t := x_t. The formulations differ in one line of section 4.
#
# The reverse chain asks the network for the noise in y_t, removes all of it, which leaves an
# estimate of the clean image, and goes some way towards this estimate. The steps below call the
# estimate x_0. A chain of few steps skips times. So each formula uses alpha_bar at the current time
# and alpha_bar_next at the chain's next, smaller time. The last step goes to the image: there
# alpha_bar_next is 1. In `q_sample`, `predict_x0` and `q_posterior` they are numbers or, where each
# image has a time of its own, [B, 1, 1, 1].


def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    """alpha_bar_t, the share of the image's power that is left at each time: [T], float64."""
    # alpha_bar_t = prod_{s <= t} (1 - beta_s), with beta linear in t
    #
    # The range of beta is made for T = 1000, where 4e-5 of the power is left. It does not adapt to
    # T: with T = 100 a third would be left at the end, which N(0, I) does not fit.
    #
    # In float32 the smallest 1 - alpha_bar = 1e-4 would have only three digits. That is enough to
    # train with. The samplers combine several such differences, where float64 costs nothing.
    return torch.cumprod(1 - torch.linspace(beta_1, beta_T, T, dtype=torch.float64), dim=0)


def q_sample(x_0, alpha_bar, eps):
    """Draw y_t ~ q(y_t|x_0): jump from x_0 [B, C, H, W] straight to time t, with eps ~ N(0, I).

    alpha_bar: a float, or one for each image, [B, 1, 1, 1].
    """
    # y_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps
    #
    # A single step is y_t = sqrt(1 - beta_t) y_{t-1} + sqrt(beta_t) noise. Many of them shrink x_0
    # by the product of the square roots, and a sum of Gaussians is Gaussian again. If the variance
    # of y_{t-1} is 1 - alpha_bar_{t-1}, that of y_t is (1 - beta_t)(1 - alpha_bar_{t-1}) + beta_t,
    # which is 1 - alpha_bar_t (NOTES 2.3).
    return alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * eps


def predict_x0(y_t, alpha_bar, eps):
    """The clean image that is left of y_t without its noise eps: `q_sample` solved for x_0.

    y_t, eps: [B, C, H, W]; alpha_bar: as for `q_sample`.
    """
    # x_0 = (y_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)
    #
    # Errors of eps are multiplied by sqrt(1 - alpha_bar) / sqrt(alpha_bar): by 157 at t = T = 1000.
    # For this reason samplers clip x_0, and the network's last layer computes in float32.
    return (y_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5


def q_posterior(x_0, y_t, alpha_bar, alpha_bar_next):
    """Mean and variance of q(y_next|y_t, x_0): the step back, if the clean image were known.

    x_0, y_t: [B, C, H, W]; alpha_bar, alpha_bar_next: as for `q_sample`; alpha_bar_next may be 1.
    """
    # mean     = sqrt(alpha_bar_next) beta / (1 - alpha_bar) x_0
    #          + sqrt(1 - beta) (1 - alpha_bar_next) / (1 - alpha_bar) y_t
    # variance = beta (1 - alpha_bar_next) / (1 - alpha_bar),  beta = 1 - alpha_bar / alpha_bar_next
    #
    # Bayes' rule, with the Gaussians q(y_next|x_0) and q(y_t|y_next) (NOTES 2.4). On the full grid
    # of times beta is beta_t; on a coarser one it is the noise added between two of its times.
    beta = 1 - alpha_bar / alpha_bar_next
    weight_of_x_0 = alpha_bar_next**0.5 * beta / (1 - alpha_bar)
    weight_of_y_t = (1 - beta) ** 0.5 * (1 - alpha_bar_next) / (1 - alpha_bar)
    mean = weight_of_x_0 * x_0 + weight_of_y_t * y_t
    variance = beta * (1 - alpha_bar_next) / (1 - alpha_bar)
    return mean, variance


def ddpm_step(y_t, x_0, alpha_bar, alpha_bar_next, noise, variance='small'):
    """The ancestral step of DDPM: a draw from the posterior, as if the estimate x_0 were true.

    y_t, x_0, noise: [B, C, H, W], noise ~ N(0, I); alpha_bar, alpha_bar_next: floats; variance:
    'small' or 'large'. Returns y_next.
    """
    # y_next = mean of q(y_next|y_t, x_0) + standard deviation * noise; no noise in the last step
    #
    # The "small" variance is the posterior's, the "large" one is beta. The true reverse step,
    # q(y_next|y_t), has them for two extreme sets of data. If there is a single image, it is
    # known, and the reverse step is the posterior. If images are white noise, x_0 ~ N(0, I), then
    # all y_t ~ N(0, I), and a step back is as uncertain as a step forward: its variance is beta.
    mean, small = q_posterior(x_0, y_t, alpha_bar, alpha_bar_next)
    large = 1 - alpha_bar / alpha_bar_next
    if alpha_bar_next == 1:
        return mean
    chosen = large if variance == 'large' else small
    return mean + chosen**0.5 * noise


def ddim_step(y_t, x_0, alpha_bar, alpha_bar_next, noise, eta=0.0):
    """The step of DDIM: deterministic for eta = 0, the ancestral step ("small") for eta = 1.

    y_t, x_0, noise: [B, C, H, W], noise ~ N(0, I); alpha_bar, alpha_bar_next: floats. Returns
    y_next.
    """
    # y_next = sqrt(alpha_bar_next) x_0 + sqrt(1 - alpha_bar_next - sigma^2) eps + sigma noise,
    # sigma  = eta * standard deviation of the posterior
    #
    # If x_0 is right and y_t ~ q(y_t|x_0), then eps ~ N(0, I), and y_next ~ q(y_next|x_0) for every
    # sigma for which the root exists, because the variances of the last two terms add up to
    # 1 - alpha_bar_next (NOTES 2.5). One network serves all of these chains: its loss (`ddpm_loss`)
    # draws y_t at one time only, never at two times of one chain, so it does not depend on how they
    # are coupled.
    #
    # eps is computed from y_t and x_0: where x_0 was clipped, the network's own eps and x_0 no
    # longer make y_t, and eta = 1 would not be the ancestral step.
    eps = (y_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5
    _, variance = q_posterior(x_0, y_t, alpha_bar, alpha_bar_next)
    sigma = eta * variance**0.5
    direction = (1 - alpha_bar_next - sigma**2) ** 0.5 * eps
    return alpha_bar_next**0.5 * x_0 + direction + sigma * noise


def half_log_snr(alpha_bar):
    """lambda, half the logarithm of the ratio of the image's power to the noise's: a number."""
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def dpmpp_step(y_t, x_0, alpha_bar, alpha_bar_next, previous):
    """The step of DPM-Solver++(2M), arXiv 2211.01095; it is not in the paper. Returns y_next.

    previous: (x_0, alpha_bar) of the step before, or None in the first step.
    """
    # y_next = sqrt((1 - alpha_bar_next) / (1 - alpha_bar)) y_t - sqrt(alpha_bar_next) (e^-h - 1) D,
    # D      = x_0 + h / (2 h_before) (x_0 - x_0_before),   h = lambda_next - lambda
    #
    # For u = y / sqrt(1 - alpha_bar) a step of DDIM (eta = 0) is u_next = u + (e^lambda_next -
    # e^lambda) x_0. With infinitely many steps that is an ODE, du = e^lambda x_0(lambda) dlambda,
    # and a step needs the integral of its right side (NOTES 2.5). DDIM takes x_0(lambda) to be
    # constant: D = x_0. Here it is taken to be the line through the last two estimates, and the
    # line is replaced by its value D in the middle of the step. The error is of third order in h in
    # a step, hence of second order in a chain: this is the 2 of "2M"; M stands for multistep.
    #
    # In the last step h is infinite, and no line can be drawn that far. There D = x_0, and y_next
    # has the limit x_0. The first step has no estimate before it, and takes D = x_0, too.
    if alpha_bar_next == 1:
        return x_0
    h = half_log_snr(alpha_bar_next) - half_log_snr(alpha_bar)
    D = x_0
    if previous is not None:
        x_0_before, alpha_bar_before = previous
        h_before = half_log_snr(alpha_bar) - half_log_snr(alpha_bar_before)
        D = x_0 + (x_0 - x_0_before) * h / (2 * h_before)
    shrink = ((1 - alpha_bar_next) / (1 - alpha_bar)) ** 0.5
    return shrink * y_t - alpha_bar_next**0.5 * math.expm1(-h) * D


SAMPLERS = ('ddpm', 'ddim', 'dpm++')
VARIANCES = ('small', 'large')
SPACINGS = ('uniform', 'quadratic', 'truncated')


def time_grid(T, steps, spacing='uniform'):
    """The times of a reverse chain: `steps` distinct whole numbers in [0, T - 1], falling."""
    if spacing not in SPACINGS:
        raise UserError(f'{spacing=}: must be one of {", ".join(SPACINGS)}')
    if not 1 <= steps <= T:
        raise UserError(f'{steps=}: must be from 1 to T = {T}')

    # Truncated: only the smallest times. It is an experiment on how much the draft carries: where
    # the network expects a nearly clean image, the chain starts from pure noise, so that all
    # structure must come from the draft.
    if spacing == 'truncated':
        return list(range(steps - 1, -1, -1))

    # Uniform: from T - 1, where y_t is noise, in equal strides (rounded half up) to T / steps - 1.
    # A single quadratic step is made from T - 1, too.
    if spacing == 'uniform' or steps == 1:
        return [math.floor(i * T / steps + 0.5) - 1 for i in range(steps, 0, -1)]

    # Quadratic, the paper's choice for few steps: t_i = (i / (steps - 1))^2 0.8 T. It is dense near
    # 0, where fine detail is decided. (So the chain starts at 0.8 T, although y_t is not quite
    # noise there: sqrt(alpha_bar) is 0.04.) Where rounding would merge two times, the next free one
    # is taken, and at most T - steps + i, which leaves room for the remaining ones.
    times = [0]
    for i in range(1, steps):
        wanted = round((i / (steps - 1)) ** 2 * 0.8 * T)
        times.append(min(max(wanted, times[-1] + 1), T - steps + i))
    return times[::-1]


def ddpm_loss(eps_theta, x_0, alpha_bar, t, eps):
    """The loss of stage 2: the mean over batch, channels and pixels of (eps - eps_theta)^2.

    eps_theta: a function of y_t [B, C, H, W] and t [B]; x_0, eps: [B, C, H, W]; alpha_bar: the
    schedule [T]; t: [B], a time for each image. Returns a tensor of shape [].
    """
    # y_t ~ q(y_t|x_0),  loss = mean of (eps - eps_theta(y_t, t))^2
    #
    # Both chains in the second line of the bound (section 1) are products over t, in y as in x: a
    # shift by x_hat changes no ratio of densities. The model's chain is p(y_T) prod_t
    # p(y_{t-1}|y_t, x_hat); for t > 1 the factor is the Gaussian of `ddpm_step`. The forward chain
    # is prod_t q(y_t|y_{t-1}). For t > 1, by Bayes' rule,
    #
    #     q(y_t|y_{t-1}) = q(y_{t-1}|y_t, x_0) q(y_t|x_0) / q(y_{t-1}|x_0),
    #
    # and of the fractions the product leaves q(y_T|x_0) / q(y_1|x_0). So the line is a sum: for
    # each t > 1 there is -KL( q(y_{t-1}|y_t, x_0) || p(y_{t-1}|y_t, x_hat) ), beside a term for
    # t = 1 and one for y_T (NOTES 2.7).
    #
    # If both Gaussians have the same variance, the KL is a squared error of eps times a weight, by
    # far the largest at small t. DDPM sets all weights to 1. The bound gets worse and the images
    # get better: less of the network is spent on small t, where the noise is too faint to be seen.
    y_t = q_sample(x_0, rearrange(alpha_bar[t], 'b -> b 1 1 1'), eps)
    return F.mse_loss(eps_theta(y_t, t), eps)


class Diffusion(nn.Module):
    """The schedule, and the reverse chain for any network eps_theta(y_t [B, C, H, W], t [B])."""

    def __init__(self, T=1000):
        super().__init__()
        alpha_bar = linear_schedule(T)
        self.T = T
        self.schedule = alpha_bar.tolist()  # for the samplers: Python's floats are float64
        self.register_buffer('alpha_bar', alpha_bar.float(), persistent=False)  # for the loss

    @torch.no_grad()
    def sample(
        self,
        eps_theta,
        y_T,
        draw_noise,
        steps,
        sampler='ddpm',
        spacing='quadratic',
        variance='small',
        eta=0.0,
        watch=None,
    ):
        """Run the reverse chain from y_T [B, C, H, W] to x_0 in [-1, 1], in `steps` network calls.

        draw_noise: a function that returns fresh N(0, I) noise for each step, of a shape that
        broadcasts to y_T's: [1, C, H, W] if all images share it.
        variance matters to the sampler 'ddpm' only, eta to 'ddim' only.
        watch: None, or a function that is called in each step with y_t and the estimate of x_0.
        Raises UserError for names that are not in SAMPLERS, SPACINGS or VARIANCES.
        """
        if sampler not in SAMPLERS or variance not in VARIANCES:
            raise UserError(f'{sampler=}, {variance=}: must be in {SAMPLERS} and {VARIANCES}')
        times = time_grid(self.T, steps, spacing)
        alpha_bars = [self.schedule[t] for t in times]
        alpha_bars.append(1.0)  # after the last step no noise is left

        y_t = y_T
        previous = None  # (x_0, alpha_bar) of the step before, for the multistep solver
        for t, alpha_bar, alpha_bar_next in zip(times, alpha_bars, alpha_bars[1:]):
            # Ask the network which noise is in y_t ...
            eps = eps_theta(y_t, torch.full((len(y_t),), t, device=y_t.device))

            # ... and remove it all: that leaves the estimate of the clean image. Pixels lie in
            # [-1, 1]; where t is large and errors of eps are multiplied by up to 157, the clip
            # keeps the chain on course.
            x_0 = predict_x0(y_t, alpha_bar, eps).clamp(-1, 1)
            if watch is not None:
                watch(y_t, x_0)

            # Take one step towards it, to the next smaller time of the grid.
            if sampler == 'ddpm':
                y_t = ddpm_step(y_t, x_0, alpha_bar, alpha_bar_next, draw_noise(), variance)
            elif sampler == 'ddim':
                y_t = ddim_step(y_t, x_0, alpha_bar, alpha_bar_next, draw_noise(), eta)
            elif sampler == 'dpm++':
                y_t = dpmpp_step(y_t, x_0, alpha_bar, alpha_bar_next, previous)
            previous = (x_0, alpha_bar)
        return y_t


# ==== 3. THE CONDITIONAL U-NET, eps_theta =========================================================
#
# It is given the noisy image and the draft, stacked as channels, and the time, and returns the
# noise. On the way down residual blocks alternate with halvings of the resolution: at fewer pixels
# a convolution of 3x3 reaches further, and attention, by which in the middle every pixel sees all
# others, is cheap. On the way up the resolution doubles again. As halving loses the exact places of
# things, every feature map of the way down is stored and handed to its partner on the way up.


def time_embedding(t, width):
    """Times as points on circles, float32: t [B] -> [B, width], cosines first, then sines.

    The answer is on the device of t.
    """
    # cos(w_i t) and sin(w_i t),  w_i = exp(-ln(10^4) i / (width / 2)),  i = 0 ... width / 2 - 1
    #
    # A single number t would be a poor input: the network must tell neighbouring times apart as
    # well as early from late ones. The fastest circle turns by one radian a step, the slowest by
    # about 10^-4: like the hands of a clock, together they tell the time at every scale.
    i = torch.arange(width // 2, device=t.device)
    frequencies = torch.exp(-math.log(1e4) / (width // 2) * i)
    angles = t[:, None] * frequencies  # [B, width / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero_init(conv):
    """The same convolution with all its parameters set to zero."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


class ResBlock(nn.Module):
    """A residual block that is told the time: [B, in_channels, H, W] -> [B, out_channels, H, W].

    embedding_dim: width of the embedding of t (and z); groups: of GroupNorm. With scale_shift the
    embedding scales and shifts the features, which the authors use in networks that see z;
    without, it is added to them.
    """

    def __init__(self, in_channels, out_channels, embedding_dim, groups, dropout, scale_shift):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.project = nn.Linear(embedding_dim, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity()
        if in_channels != out_channels:
            self.skip = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, h, embedding):
        # First half of the branch: normalise, apply the nonlinearity, mix neighbouring pixels.
        branch = self.conv1(F.silu(self.norm1(h)))

        # Tell every pixel the time, and z, if the network was built for it: one number a channel,
        # added before the norm, or two, a scale and a shift after it. (The norm subtracts what the
        # channels of a group have in common; their differences arrive.) All pixels are told the
        # same, because time and z are the same for all of them.
        embedding = rearrange(self.project(F.silu(embedding)), 'b c -> b c 1 1')
        if self.scale_shift:
            scale, shift = embedding.chunk(2, dim=1)
            branch = self.norm2(branch) * (1 + scale) + shift
        else:
            branch = self.norm2(branch + embedding)

        # Second half. `conv2` starts at zero: an untrained block passes its input through (but for
        # a change of width), so that in a deep stack of them no signal and no gradient explodes.
        branch = self.conv2(self.dropout(F.silu(branch)))
        return self.skip(h) + branch


class Attention(nn.Module):
    """Residual self-attention in which every pixel looks at all others: [B, C, H, W] -> same."""

    def __init__(self, channels, heads, groups):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, h):
        # Each pixel makes a query, a key and a value. The channels are split among heads, since one
        # softmax gives one weighting of the other pixels: several heads look at several things.
        query, key, value = rearrange(
            self.qkv(self.norm(h)),
            'b (qkv heads d) y x -> qkv b heads (y x) d',
            qkv=3,
            heads=self.heads,
        )

        # softmax(query key^T / sqrt(d)) value: a mean of the values of all pixels, weighted by how
        # well their keys fit the query. sqrt(d) keeps the softmax from saturating as d grows.
        mixed = F.scaled_dot_product_attention(query, key, value)

        mixed = rearrange(mixed, 'b heads (y x) d -> b (heads d) y x', y=h.shape[2])
        return h + self.out(mixed)


class UNetBlock(nn.Module):
    """A residual block and, at resolutions that attend, attention behind it (else None)."""

    def __init__(self, residual, attention):
        super().__init__()
        self.residual = residual
        self.attention = attention

    def forward(self, h, embedding):
        h = self.residual(h, embedding)
        if self.attention is not None:
            h = self.attention(h)
        return h


class Downsample(nn.Module):
    """Half the resolution, by a convolution with stride 2: [B, C, H/2, W/2].

    It is called like a block, so that `UNet.trunk` is a plain loop, but needs no embedding.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, h, embedding):
        return self.conv(h)


class Upsample(nn.Module):
    """Twice the resolution: pixels repeated, then a convolution: [B, C, 2H, 2W]."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h, embedding):
        return self.conv(F.interpolate(h, scale_factor=2))


def embedding_mlp(width, embedding_dim):
    """Two linear layers that turn t's circles, or z, into what the residual blocks are told."""
    return nn.Sequential(
        nn.Linear(width, embedding_dim),
        nn.SiLU(),
        nn.Linear(embedding_dim, embedding_dim),
    )


def groups_of(channels):
    """How many groups GroupNorm has in a U-Net whose stem has so many channels."""
    # GroupNorm subtracts from each group of channels their common mean over all pixels. The fewer
    # channels a group has, the more of the image's mean colour is lost. The paper's networks have
    # 32 groups, and keep them here. Our small networks were seen to drift in colour with many
    # groups (NOTES 4), and have a single one.
    return 32 if channels >= 128 else 1


class UNet(nn.Module):
    """eps_theta: what it is shown, [B, in_channels, size, size], t [B], z [B, z_dim] -> the noise.

    channels: the width of the stem; multipliers: each level's width as a multiple of it, e.g.
    (1, 2, 2, 2); blocks: how many a level has on the way down; attention: the resolutions, in
    pixels, that attend besides the middle; z_dim: 0 if the network is not to see z; bfloat16:
    compute all but the last layers in it. Raises UserError if the numbers do not fit each other.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        size,
        channels,
        multipliers,
        blocks,
        attention=(),
        heads=1,
        dropout=0.0,
        z_dim=0,
        bfloat16=False,
    ):
        super().__init__()
        self.widths = [multiplier * channels for multiplier in multipliers]
        self.resolutions = [size // 2**level for level in range(len(multipliers))]
        self.channels = channels
        self.check(size, attention, heads)
        self.image_shape = (out_channels, size, size)
        self.bfloat16 = bfloat16

        groups = groups_of(channels)
        embedding_dim = 4 * channels
        scale_shift = z_dim > 0

        def new_block(width_in, width, attends):
            residual = ResBlock(width_in, width, embedding_dim, groups, dropout, scale_shift)
            return UNetBlock(residual, Attention(width, heads, groups) if attends else None)

        self.time_mlp = embedding_mlp(channels, embedding_dim)
        self.z_mlp = embedding_mlp(z_dim, embedding_dim) if z_dim else None
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        stored = self.add_way_down(new_block, blocks, attention)

        # The middle, at the lowest resolution, always attends: there are the fewest pixels, so to
        # compare each with all others is cheapest.
        lowest = self.widths[-1]
        self.middle = nn.ModuleList(
            [new_block(lowest, lowest, True), new_block(lowest, lowest, False)]
        )
        self.add_way_up(new_block, blocks, attention, stored)

        # The last layer starts at zero: a network that knows nothing yet predicts no noise, instead
        # of an arbitrary pattern that it would first have to unlearn.
        self.head_norm = nn.GroupNorm(groups, channels * multipliers[0])
        self.head = zero_init(nn.Conv2d(channels * multipliers[0], out_channels, 3, padding=1))

    def check(self, size, attention, heads):
        """Say in words which numbers do not fit."""
        # Even, for as many cosines as sines; a multiple of 32 where GroupNorm has 32 groups.
        if self.channels % 2 or (self.channels >= 128 and self.channels % 32):
            raise UserError(
                f'channels={self.channels}: must be even; from 128 on 32 must divide it'
            )
        halvings = len(self.widths) - 1
        if halvings < 0 or size % 2**halvings:
            raise UserError(f'{size=} cannot be halved for {len(self.widths)} multipliers')
        if not set(attention) <= set(self.resolutions):
            raise UserError(f'{attention=}: the levels have {self.resolutions} pixels')
        for width in self.widths:
            if width % heads:
                raise UserError(f'{heads=} cannot share the {width} channels of a level evenly')

    def add_way_down(self, new_block, blocks, attention):
        """Fill `down`; returns the widths of the feature maps that `trunk` will store."""
        # It stores one after the stem, after each block and after each halving.
        width_in = self.channels
        stored = [width_in]
        for level, width in enumerate(self.widths):
            for _ in range(blocks):
                self.down.append(new_block(width_in, width, self.resolutions[level] in attention))
                stored.append(width)
                width_in = width
            if level < len(self.widths) - 1:
                self.down.append(Downsample(width))
                stored.append(width)
        return stored

    def add_way_up(self, new_block, blocks, attention, stored):
        """Fill `up`: the levels in reverse, with one block for each map that was stored there."""
        # That is one block more than on the way down: the level also stored what came into it, from
        # the stem or from a halving.
        width_in = self.widths[-1]
        for level in reversed(range(len(self.widths))):
            width = self.widths[level]
            for _ in range(blocks + 1):
                attends = self.resolutions[level] in attention
                self.up.append(new_block(width_in + stored.pop(), width, attends))
                width_in = width
            if level > 0:
                self.up.append(Upsample(width))

    def forward(self, shown, t, z=None):
        # Autocast computes the products in bfloat16: fast where the device has units for it.
        if self.bfloat16:
            with torch.autocast(shown.device.type, torch.bfloat16):
                h = self.trunk(shown, t, z)
        else:
            h = self.trunk(shown, t, z)

        # The last layers in float32: `predict_x0` multiplies errors of eps by up to 157, and in
        # bfloat16 they would be 1.4 times as large (NOTES 4).
        return self.head(F.silu(self.head_norm(h.float())))

    def trunk(self, shown, t, z):
        """The features before the last layers: [B, width of the first level, size, size]."""
        embedding = self.time_mlp(time_embedding(t, self.channels))
        if self.z_mlp is not None:
            embedding = embedding + self.z_mlp(z)

        # The way down.
        h = self.stem(shown)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding)
            skips.append(h)

        for layer in self.middle:
            h = layer(h, embedding)

        # The way up: every block is given the newest map not yet used, beside h as more channels.
        for layer in self.up:
            if not isinstance(layer, Upsample):
                h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, embedding)
        return h


# ==== 4. THE TWO-STAGE MODEL: a diffusion model conditioned on the drafts of the frozen VAE =======
#
# Here the parts meet. In training, the VAE encodes an image, draws a code and decodes it to a
# draft; the U-Net learns to find the noise in that image beside its draft. In sampling, the code
# comes from the prior. As the U-Net has seen drafts of real images only, a code from where no image
# has its code makes a draft that it was not trained on. The baseline is the same model without VAE.

# Formulation 1, Formulation 2, and the baseline: the same diffusion model without drafts.
FORMS = ('1', '2', 'uncond')


def network_input(y_t, x_hat, form):
    """What eps_theta is shown of y_t and the draft x_hat in [-1, 1]: [B, 2C, H, W]."""
    # [x_t, x_hat] on the channel axis,  x_t = y_t (Formulation 1) or y_t + x_hat (Formulation 2)
    #
    # This is all that tells the formulations apart. The first convolution is linear, and
    # W_1 (y_t + x_hat) + W_2 x_hat = W_1 y_t + (W_1 + W_2) x_hat: so both can represent the same
    # functions, and differ in where training starts and how it proceeds.
    if form == '1':
        x_t = y_t
    elif form == '2':
        x_t = y_t + x_hat
    else:
        raise UserError(f"{form=}: must be '1' or '2'")
    return torch.cat([x_t, x_hat], dim=1)


class DiffuseVAE(nn.Module):
    """The frozen VAE and the diffusion model on its drafts; `forward` is the loss of stage 2.

    vae: of stage 1, or None if form is 'uncond'; unet: with 2C input channels, or C for 'uncond';
    form: one of FORMS; cond_drop: share of the training images whose draft and z are withheld, for
    guidance. Raises UserError for another form.
    """

    metrics = ('loss',)  # what `forward` returns

    def __init__(self, vae, unet, diffusion, form, cond_drop=0.0):
        super().__init__()
        if form not in FORMS or (vae is None) != (form == 'uncond'):
            raise UserError(f"{form=}: must be '1' or '2' with a VAE, or 'uncond' without one")
        self.vae = vae
        self.unet = unet
        self.diffusion = diffusion
        self.form = form
        self.cond_drop = cond_drop
        self.image_shape = unet.image_shape
        self.z_dim = vae.z_dim if vae is not None else 0
        if vae is not None:
            vae.requires_grad_(False)
            vae.eval()

    @property
    def device(self):
        """Where the model's tensors are."""
        return self.diffusion.alpha_bar.device

    def train(self, mode=True):
        """Switch dropout on or off, as in every module, but never in the frozen VAE."""
        super().train(mode)
        if self.vae is not None:
            self.vae.eval()
        return self

    def eps_theta(self, y_t, t, x_hat, z):
        """The U-Net's estimate of the noise in y_t [B, C, H, W], given x_hat in [-1, 1] and z.

        z [B, z_dim] is ignored, unless the U-Net was built with z_dim. Both are None, and ignored,
        for the baseline.
        """
        if self.form == 'uncond':
            return self.unet(y_t, t)
        return self.unet(network_input(y_t, x_hat, self.form), t, z)

    def random_inputs(self, n, generator):
        """What the loss of n images draws, by the names of `forward`'s arguments.

        (Dropout draws its own masks; section 7 seeds them for each step.)
        """
        # DDPM draws the times independently. Here the i-th image of the batch gets one from the
        # i-th of n equal parts of [0, T). As images are in random order, each still gets all times
        # equally often. The gain is a less noisy loss. The loss is largest at small times, where
        # the little noise is hard to tell from the image's own detail, and a batch that happened to
        # have many of them would have a larger one. The clamp guards against rounding up to T.
        T = self.diffusion.T
        t = (torch.arange(n) + torch.rand(n, generator=generator)) * T / n
        return {
            't': t.long().clamp(max=T - 1),
            'eps_z': torch.randn(n, self.z_dim, generator=generator),
            'eps': torch.randn(n, *self.image_shape, generator=generator),
            'keep': (torch.rand(n, generator=generator) >= self.cond_drop).float(),
        }

    def forward(self, x, t, eps_z, eps, keep):
        """The loss for images x [B, C, H, W] in [0, 1], as a tuple like `metrics`.

        t: [B], times; eps_z: [B, z_dim] and eps: [B, C, H, W], noise of the code and of the image;
        keep: [B], 0 where draft and z are withheld, else 1.
        """
        x_hat = None
        z = None
        if self.vae is not None:
            # Encode. The bound has an expectation over q(z|x), so z is a sample, not the mean, and
            # another one each time that the image comes up. The VAE is frozen: no gradients.
            with torch.no_grad():
                mu, logvar = self.vae.encode(x)
                z = reparameterize(mu, logvar, eps_z)

                # Draft, and bring it from the VAE's [0, 1] to the diffusion model's [-1, 1].
                x_hat = 2 * self.vae.decode(z) - 1

            # Withhold some, if asked to: for guidance the network must also know the answer without
            # a draft. It then sees zeros, that is a grey image and the middle of the prior.
            x_hat = x_hat * rearrange(keep, 'b -> b 1 1 1')
            z = z * rearrange(keep, 'b -> b 1')

        # Noise the image (all of it, also where the VAE models only a part), and predict the noise
        # given the draft.
        def conditioned(y_t, t):
            return self.eps_theta(y_t, t, x_hat, z)

        x_0 = 2 * x - 1
        return (ddpm_loss(conditioned, x_0, self.diffusion.alpha_bar, t, eps),)

    def generate(self, z, y_T, draw_noise, draft=None, guidance=0.0, **chain):
        """Sampling: the draft of a code z, and the draft refined, both [B, C, H, W] in [0, 1].

        z: [B, z_dim], from the prior N(0, I) for new images; beside a given draft only a U-Net that
        was built with z_dim looks at it;
        y_T: [B, C, H, W], noise ~ N(0, I) (in Formulation 2 as well, where x_T is y_T + x_hat);
        draft: [B, C, H, W] in [0, 1], to be refined in place of the decoder's;
        guidance: the weight w >= 0, for models with cond_drop; above 0 a step makes two calls.
        `draw_noise` and the other keywords, such as steps=50, are those of `Diffusion.sample`.
        The baseline returns None for the draft.
        """
        # Stage 1 drafts.
        x_hat = None
        if self.vae is not None:
            if draft is None:
                draft = self.vae.decode(z)
            x_hat = 2 * draft - 1

        # Stage 2 refines, by a reverse chain that is shown the draft at each step.
        def conditioned(y_t, t):
            eps = self.eps_theta(y_t, t, x_hat, z)
            if guidance == 0:
                return eps

            # Classifier-free guidance: (1 + w) eps(x_hat, z) - w eps(0, 0) exaggerates what draft
            # and z change in the answer. Without them, Formulation 2's network sees y_t itself.
            eps_null = self.eps_theta(y_t, t, 0 * x_hat, 0 * z)
            return (1 + guidance) * eps - guidance * eps_null

        x_0 = self.diffusion.sample(conditioned, y_T, draw_noise, **chain)
        return draft, (x_0 + 1) / 2


# ==== PART 2: RUNNING IT ==========================================================================
# What a training run needs besides the method: images, settings, a loop, and pictures to look at.
# A reader who came for the method may leave here; one who wants to train should read on.

# ==== 5. DATA, and what is printed and written ====================================================
# A set of images gives batches in [0, 1], for the VAE; section 4 maps them to [-1, 1] for the
# diffusion model. Held-out images never enter training: they are a test split, 5% of a folder, or
# shapes drawn with another seed. The built-in shapes need no download. A VAE learns their outline,
# place, size and colours in minutes and blurs their stripes, which the diffusion model restores:
# so a laptop shows what the method does.


def seed_of(*key):
    """A seed that depends on all parts of a key, e.g. (0, 'step', 17), and on nothing else."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], 'little') >> 1  # 63 bits: a signed number of 64 holds it


def make_generator(*key):
    """A random generator on the CPU with the `seed_of` a key."""
    return torch.Generator().manual_seed(seed_of(*key))


class Progress:
    """A line of progress: rewritten in place on a terminal, elsewhere one every ten seconds.

    after: seconds before the first line, for what is usually done by then.
    """

    def __init__(self, after=0):
        self.silent = is_helper()
        self.next = time.monotonic() + after
        self.open = False  # whether a line stands that has not been ended

    def show(self, text, end=False):
        """Print the line now, or drop it if the last one is too recent and this is not the end."""
        now = time.monotonic()
        if self.silent or not (end or now >= self.next):
            return
        terminal = sys.stdout.isatty()
        self.next = now + (0.1 if terminal else 10)
        self.open = not end
        if terminal:
            print(f'\r{text}\x1b[K', end='\n' if end else '', flush=True)
        else:
            print(text, flush=True)


def is_helper():
    """Whether torchrun started this process and it is not the first, which prints for all."""
    return int(os.environ.get('RANK', 0)) > 0


def complain(text):
    """Print a warning or an error on a line of its own, in place of the line of progress."""
    start = '\r\x1b[K' if sys.stderr.isatty() else ''
    print(f'{start}{text}', file=sys.stderr, flush=True)


def warn(text):
    """Print a warning, once if there are several processes."""
    if not is_helper():
        complain(f'warning: {text}')


KINDS = ('wide', 'circle', 'tall')  # of shapes: a wide bar, a circle and a tall bar


def hsv_to_rgb(hue, saturation, value):
    """Colours in [0, 1]: hue [N, 1, 1], saturation and value numbers -> [N, 3, 1, 1]."""
    # Each channel is a trapezoid over the circle of hues; red, green and blue are a third apart.
    k = (torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1) + 6 * hue[:, None]) % 6
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def draw_shapes(n, generator, size=32):
    """Draw n striped shapes on plain grounds.

    Returns uint8 images [n, 3, size, size], and the factors behind them, each [n]: kind is 0, 1 or
    2 (see KINDS), the others lie in [0, 1].
    """
    # Eight uniform numbers decide an image. The ranges are such that a Gaussian code can hold them:
    # hues, for example, go from red to blue, as a whole circle of them would not fit (NOTES 4).
    u = torch.rand(8, n, 1, 1, generator=generator)
    kind = (3 * u[0]).long()
    hue = 0.7 * u[1]
    ground = 0.7 * u[2]
    center_x = 0.435 + 0.13 * u[3]
    center_y = 0.435 + 0.13 * u[4]
    radius = 0.27 + 0.08 * u[5]
    angle = math.pi / 4 * (4 * u[6]).floor()  # of the stripes: one of four
    phase = 2 * math.pi * u[7]

    # Places relative to the centre; the image is the unit square.
    pixel = (torch.arange(size) + 0.5) / size
    x = pixel - center_x  # [n, 1, size]
    y = pixel[:, None] - center_y  # [n, size, 1]

    # The distance of each pixel to the outline, negative inside; so the edge can be antialiased.
    wide = torch.maximum(x.abs() - 1.2 * radius, y.abs() - 0.65 * radius)
    circle = (x**2 + y**2).sqrt() - 0.95 * radius
    tall = torch.maximum(x.abs() - 0.65 * radius, y.abs() - 1.2 * radius)
    distance = torch.stack([wide, circle, tall])[kind.flatten(), torch.arange(n)]
    inside = (0.5 - size / 2 * distance).clamp(0, 1)[:, None]  # [n, 1, size, size]

    # Stripes, five pixels a period, modulate the shape's colour.
    along = x * angle.cos() + y * angle.sin()
    stripes = torch.sin(2 * math.pi / 5 * size * along + phase)
    shape = hsv_to_rgb(hue, 0.75, 0.62) * (1 + 0.6 * stripes[:, None])
    images = inside * shape + (1 - inside) * hsv_to_rgb(ground, 0.3, 0.9)

    factors = {'kind': kind, 'hue': u[1], 'ground': u[2], 'x': u[3], 'y': u[4], 'size': u[5]}
    factors = {name: factor.flatten() for name, factor in factors.items()}
    return (255 * images).round().byte(), factors


# The white of grey pictures with 8, 10, 12, 14 and 16 bits (8, because wider numbers may hold such
# values, too).
WHITES = (255, 1023, 4095, 16383, 65535)


def read_picture(path, size, crop=True, grey=False):
    """The picture in a file: uint8 [3, size, size], or [1, size, size] if grey.

    With `crop` it is the central square, else all of it, squeezed; small pictures are enlarged.
    Raises UserError if Pillow cannot read the file, or if `to_eight_bits` finds no white for it.
    """
    try:
        picture = Image.open(path)  # of a file with several pictures, the first
        picture.draft(None, (3 * size, 3 * size))  # JPEGs: decode no more than is needed
        picture.load()
        picture = ImageOps.exif_transpose(picture)  # as the photographer held the camera
        if picture.mode == 'F' or picture.mode.startswith('I'):
            picture = to_eight_bits(picture)

        # What is transparent has a colour that nobody was meant to see: it becomes white.
        if picture.mode in ('LA', 'PA', 'RGBA') or 'transparency' in picture.info:
            picture = picture.convert('RGBA')
            white = Image.new('RGBA', picture.size, 'white')
            picture = Image.alpha_composite(white, picture)
        picture = picture.convert('L' if grey else 'RGB')
    except MemoryError:
        raise
    except Exception as error:  # on a broken file Pillow's decoders raise nearly anything
        raise UserError(f'{path}: {error}') from error

    if crop:
        picture = ImageOps.fit(picture, (size, size), method=Image.LANCZOS)
    else:
        picture = picture.resize((size, size))
    return pil_to_tensor(picture)


def to_eight_bits(picture):
    """A grey picture of integers or floats (mode I, I;16 or F) with its white as 255 (mode L)."""
    whites = WHITES
    if picture.mode == 'F':
        whites = (1, *WHITES)
    else:
        picture = picture.convert('I')  # 32 bits
    values = pil_to_tensor(picture).double()

    # A file does not say how many of its bits are used. They are taken to be the fewest that its
    # values need: so a picture of 16 bits without a value above 16383 is read as one of 14, four
    # times as bright. (Pillow's `convert` would clip all values at 255.)
    enough = [white for white in whites if values.max() <= white]
    if not enough or values.min() < 0:
        found = f'from {values.min():g} to {values.max():g}'
        raise UserError(f'values {found}; save it with 8 bits, or from 0 to 1')
    return to_pil_image((255 / enough[0] * values).round().byte())


class Images:
    """A set of images in memory: uint8 pixels [N, C, H, W], and labels {name: [N]}."""

    def __init__(self, pixels, labels):
        self.pixels = pixels
        self.labels = labels

    def __len__(self):
        return len(self.pixels)

    def batch(self, indices):
        """The images of those indices: floats in [0, 1], [B, C, H, W]."""
        return self.pixels[indices].float() / 255

    def make_grey(self):
        """Keep one of three equal channels."""
        self.pixels = self.pixels[:, :1].contiguous()


class ImageFiles:
    """A set of images in files, for sets too large for the memory, with the same `batch`."""

    def __init__(self, paths, labels, size, crop=True, grey=False):
        self.paths = paths
        self.labels = labels
        self.size = size
        self.crop = crop
        self.grey = grey
        self.pool = ThreadPoolExecutor()  # Pillow decodes several files at once

    def __len__(self):
        return len(self.paths)

    def read(self, index):
        """The image of that index: uint8 [C, size, size]. UserError if it cannot be read."""
        return read_picture(self.paths[int(index)], self.size, self.crop, self.grey)

    def read_or_error(self, index):
        """The image of that index, or the UserError for it."""
        try:
            return self.read(index)
        except UserError as error:
            return error

    def batch(self, indices):
        """The images of those indices: floats in [0, 1], [B, C, H, W]."""
        return torch.stack(list(self.pool.map(self.read, indices))).float() / 255

    def make_grey(self):
        """Keep one of three equal channels."""
        self.grey = True


def readable(paths, size, grey):
    """Read all pictures once, and keep those that can be read: in memory if they fit into 1 GB.

    What cannot be read is counted in one line, and neither trained on nor measured. Progress is
    shown if it takes more than three seconds.
    """
    files = ImageFiles(paths, {}, size, grey=grey)
    channels = 1 if grey else 3
    in_memory = channels * size**2 * len(files) <= 1e9
    progress = Progress(after=3)
    kept = []
    pixels = []
    errors = []
    for index, image in enumerate(files.pool.map(files.read_or_error, range(len(files)))):
        progress.show(f'reading pictures: {index} of {len(files)}')
        if isinstance(image, UserError):
            errors.append(image)
            continue
        kept.append(paths[index])
        if in_memory:
            pixels.append(image)

    if progress.open:
        progress.show(f'read {len(files)} pictures', end=True)
    if errors:
        count = f'{len(errors)} of {len(files)} image files cannot be read'
        warn(f'{count} and are left out; the first is {errors[0]}')
    if in_memory and pixels:
        return Images(torch.stack(pixels), {})
    return ImageFiles(kept, {}, size, grey=grey)


# The loaders of all sets are called alike: with the name or the folder, the folder of downloads,
# height and width, whether the training or the held-out images are wanted, and whether they have
# one channel. Each uses what it needs, and returns `Images` or `ImageFiles`.


def load_shapes(data, root, size, train, grey):
    """20,000 shapes to train on, 2,000 held out."""
    n = 20_000 if train else 2_000
    pixels, factors = draw_shapes(n, make_generator('shapes', train), size)
    return Images(pixels, factors)


def load_torchvision(dataset, root, files, **split):
    """A set that torchvision can download, below the folder `root`, or a UserError.

    files: what it finds there if it was downloaded by hand, from that folder on.
    """
    try:
        return dataset(root, download=True, **split)
    except (OSError, RuntimeError, ValueError, ImportError, AssertionError) as error:
        raise UserError(f'--data: no {root}/{files}; no download: {error}') from error


def load_mnist(data, root, size, train, grey):
    """Digits or clothes: 60,000 to train on, 10,000 held out, 28x28 with a border of 2 pixels."""
    files = 'raw/train-images-idx3-ubyte and the three files beside it'
    if data == 'mnist':
        found = load_torchvision(datasets.MNIST, root, f'MNIST/{files}', train=train)
        label = 'digit'
    else:
        found = load_torchvision(datasets.FashionMNIST, root, f'FashionMNIST/{files}', train=train)
        label = 'class'
    pixels = F.pad(found.data[:, None], (2, 2, 2, 2))  # [N, 1, 32, 32]
    return Images(pixels, {label: torch.as_tensor(found.targets)})


def load_cifar10(data, root, size, train, grey):
    """50,000 photographs of ten classes to train on, 10,000 held out."""
    files = 'cifar-10-batches-py/data_batch_1 and the other files of that archive'
    found = load_torchvision(datasets.CIFAR10, root, files, train=train)
    pixels = rearrange(torch.from_numpy(found.data), 'n y x c -> n c y x')
    return Images(pixels, {'class': torch.as_tensor(found.targets)})


def load_celeba(data, root, size, train, grey):
    """162,770 faces to train on, 19,962 held out, with 40 attributes such as Smiling.

    As the authors do, the 178x218 pixels are squeezed to a square without a crop. To download the
    set torchvision needs the package gdown.
    """
    files = 'celeba/img_align_celeba/000001.jpg, or no celeba/list_attr_celeba.txt and the other '
    files += 'lists beside it: put them there, or install the package gdown'
    split = 'train' if train else 'test'
    found = load_torchvision(datasets.CelebA, root, files, split=split)
    paths = [f'{root}/celeba/img_align_celeba/{name}' for name in found.filename]
    labels = {name: found.attr[:, i] for i, name in enumerate(found.attr_names) if name}
    return ImageFiles(paths, labels, size, crop=False)


def name_hash(path, folder):
    """A number from 0 to 1, exclusive, that depends on a file's name below the folder alone."""
    name = path.relative_to(folder).as_posix()
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], 'big') / 2**64


def files_below(folder, seen):
    """All files below a folder but hidden ones; links are followed. seen: the folders entered."""
    # A link may lead back up: no folder is entered twice.
    real = folder.resolve()
    if real in seen:
        return []
    seen.add(real)
    found = []
    for path in sorted(folder.iterdir()):
        # Hidden are, for example, the files ._name.jpg that a Mac leaves beside each name.jpg.
        if path.name.startswith('.'):
            continue
        if path.is_dir():
            found += files_below(path, seen)
        else:
            found.append(path)
    return found


def pictures_below(folder):
    """The paths of all pictures below a folder: at least two, or a UserError."""
    data = f'--data {folder}'
    if not folder.exists():
        raise UserError(f'{data}: no such folder, and not one of {", ".join(DATA_SETS)}')
    if not folder.is_dir():
        raise UserError(f'{data}: a file; give the folder that the pictures are in')
    files = files_below(folder, set())
    if not files:
        raise UserError(f'{data}: an empty folder')

    # A picture has the suffix of a format that Pillow can read.
    Image.init()
    suffixes = {name for name, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures = [path for path in files if path.suffix.lower() in suffixes]
    if not pictures:
        found = ', '.join(sorted({path.suffix or path.name for path in files})[:5])
        raise UserError(f'{data}: no images, but {len(files)} other files ({found})')
    if len(pictures) < 2:
        raise UserError(f'{data}: needs at least 2 images, found 1')
    return pictures


def first_readable(paths, size):
    """The first of the paths whose picture can be read, in a list; [] if there is none."""
    for path in paths:
        try:
            read_picture(path, size)
            return [path]
        except UserError:
            continue
    return []


def load_folder(data, root, size, train, grey):
    """All pictures below the folder `data`. Held out are those whose name has a hash below 0.05."""
    # That is about 5%. By a hash, not by chance: so held-out pictures stay held out when files are
    # added. Sorted by it, the first n pictures are a fair sample of all subfolders.
    folder = Path(data)
    paths = sorted(pictures_below(folder), key=lambda path: name_hash(path, folder))
    held_out = [path for path in paths if name_hash(path, folder) < 0.05]
    training = paths[len(held_out) :]

    # Of less than about a hundred files the 5% may be none: then the first image is held out, and
    # may be another one when files are added.
    if not first_readable(held_out, size):
        held_out = first_readable(training, size)
        training = [path for path in training if path not in held_out]
    chosen = training if train else held_out
    images = readable(chosen, size, grey=bool(grey))
    if len(images) == 0:
        raise UserError(f'--data {data}: needs at least 2 images that can be read')
    return images


def is_grey(images):
    """Whether all images have three equal channels.

    Of a set too large for the memory only 1000 are looked at: if these are grey, all are read so.
    """
    n = len(images)
    if isinstance(images, ImageFiles):
        n = min(1000, n)
    for indices in torch.arange(n).split(50):
        x = images.batch(indices)
        if not torch.equal(x, x[:, :1].expand_as(x)):
            return False
    return True


@dataclass
class DataSet:
    """What the program must know of a set of images."""

    load: Callable  # (data, root, size, train, grey) -> Images or ImageFiles
    size: int = 32  # height and width, unless --size says otherwise
    sizes: range = range(32, 33)  # what --size may say
    grey: bool | None = False  # whether images have one channel; None: one must look
    padding: int = 0  # pixels that `load` added on each side, to be cut off in pictures
    mirror: bool = True  # whether training may mirror: not digits, nor shoes that all point left
    rooted: bool = True  # whether its files are below --root


FOLDER = DataSet(load_folder, sizes=range(1, 4097), grey=None, rooted=False)
DATA_SETS = {
    'shapes': DataSet(load_shapes, sizes=range(16, 65), rooted=False),
    'mnist': DataSet(load_mnist, grey=True, padding=2, mirror=False),
    'fashion': DataSet(load_mnist, grey=True, padding=2, mirror=False),
    'cifar10': DataSet(load_cifar10),
    'celeba': DataSet(load_celeba, size=64, sizes=range(16, 4097)),
}


def data_set(data):
    """The `DataSet` of a name, else that of folders."""
    return DATA_SETS.get(data, FOLDER)


def full_path(data):
    """The name of a set as it is; a folder from the root of the file system on, without links."""
    return data if data in DATA_SETS else str(Path(data).resolve())


def load_images(options, train):
    """The training or the held-out images that the `TrainingOptions` name; else a UserError."""
    data = options.data
    size = options.size
    sizes = data_set(data).sizes
    if size not in sizes:
        raise UserError(f'--size {size}: --data {data} has from {sizes[0]} to {sizes[-1]}')
    return data_set(data).load(data, options.root, size, train, options.grey)


def without_padding(images, data):
    """What is seen and measured of images [N, C, H, W]: not the border around digits of 28x28."""
    border = data_set(data).padding
    return images[..., border : images.shape[2] - border, border : images.shape[3] - border]


def to_uint8(images, data):
    """Pixels for a file: [N, C, H, W] in [0, 1] -> uint8 on the CPU, rounded, without padding."""
    return (255 * without_padding(images, data)).round().clamp(0, 255).byte().cpu()


def write_grid(path, rows, data, columns=()):
    """Write rows, a list of (label, images [n, C, H, W] in [0, 1]), as one PNG.

    Labels stand in the left margin, `columns` above the images.
    """
    labels = [label for label, _ in rows]
    height, width = rows[0][1].shape[2:]
    n = max(len(images) for _, images in rows)

    # One sheet of images, white where a row is shorter; small images are enlarged.
    cells = []
    for _, images in rows:
        white = torch.ones(n - len(images), images.shape[1], height, width)
        cells += [images.cpu(), white]
    pixels = to_uint8(torch.cat(cells), data)
    grid = to_pil_image(utils.make_grid(pixels, nrow=n, padding=1, pad_value=255))
    scale = max(1, 64 // pixels.shape[-1])
    cell = scale * (pixels.shape[-1] + 1)  # from one image to the next

    # Margins with the labels.
    left = 64
    top = 16 if columns else 0
    sheet = ImageOps.scale(grid, scale, Image.NEAREST)
    sheet = ImageOps.expand(sheet, (left, top, 0, 0), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(labels):
        draw.text((4, top + (i + 0.5) * cell), label, 'black', anchor='lm')
    for i, label in enumerate(columns):
        draw.text((left + (i + 0.5) * cell, 2), label, 'black', anchor='mt')
    write_png(path, sheet)


def write_png(path, picture):
    """Write a picture of Pillow."""
    write_atomically(path, lambda file: picture.save(file, format='png'))


def write_table(path, rows):
    """Write a list of rows as CSV."""
    text = ''.join(','.join(map(str, row)) + '\n' for row in rows)
    write_atomically(path, lambda file: file.write(text.encode()))


def or_warn(write, *arguments):
    """Call write(*arguments); if the file cannot be written, warn: the work that made it goes on.

    On Windows, for example, nobody can write to a table that is open in a spreadsheet.
    """
    try:
        write(*arguments)
    except UserError as error:
        warn(error)


def write_atomically(path, write):
    """Call write(file) such that `path` becomes the whole new file, or stays the old one."""
    # Written in memory, then beside the file, then renamed: a name never stands for half a file.
    content = io.BytesIO()
    write(content)
    beside = path.with_name(f'{path.name}.{os.getpid()}.part')  # processes have one each
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content.getbuffer())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # where there is no such folder, for example
            beside.unlink()
        raise UserError(f'{path}: not written, left as it was; {error.strerror}') from error


# ==== 6. SETTINGS =================================================================================
# One dataclass for training, one for all that generates images. A field is an option of the command
# line: its type parses the text, its sentence is the help. The values of a training run come from a
# preset. 'small' is ours and trains in minutes. The others have the paper's numbers; batch, epochs,
# heads and dropout are those of the authors' scripts, where these and their YAML files differ.


NO_LIMIT = 1e15  # the `high` of options that have none; inf is too large


def option(meaning, default=None, low=None, high=NO_LIMIT, choices=None, commands=None, free=False):
    """A field of a dataclass of options.

    low, high: its range, if it has a low; choices: the values it may have; commands: those that
    take it, by default all; free: a training run may change it when it goes on.
    """
    metadata = dict(meaning=meaning, low=low, high=high, choices=choices)
    return field(default=default, metadata=metadata | dict(commands=commands, free=free))


# A preset has settings of both stages, and settings of stage 1 or of stage 2 alone: so it also says
# which options belong to which stage. All presets share these.
BOTH = dict(root='data', signal='image', seed=0, save_every=60.0)
STAGE_1 = dict(flip=False)
STAGE_2 = dict(form='1', timesteps=1000, z_cond=False, cond_drop=0.0, precision=None)
STAGE_2 |= dict(flip=True, clip=1.0, ema=0.9999)


def paper(data, size, images, vae, ddpm, multipliers, attention, dropout=0.1, lr=2e-4, flip=False):
    """A preset of the paper.

    images: size of the training set, which makes epochs steps; vae, ddpm: (epochs, batch) of stages
    1 and 2; flip: in stage 1.
    """
    epochs, batch = vae
    stage_1 = dict(flip=flip, lr=1e-4, warmup=1, clip=math.inf, ema=0.0)
    stage_1 |= dict(batch=batch, steps=epochs * images // batch)

    epochs, batch = ddpm
    stage_2 = dict(channels=128, multipliers=multipliers, blocks=2, attention=attention, heads=8)
    stage_2 |= dict(dropout=dropout, lr=lr, warmup=5000)
    stage_2 |= dict(batch=batch, steps=epochs * images // batch)

    both = dict(data=data, size=size, alpha=1.0)
    return {'both': BOTH | both, 1: STAGE_1 | stage_1, 2: STAGE_2 | stage_2}


# Small networks take a larger learning rate than the paper's. The small VAE's clip only catches
# explosions, which its lack of normalisation allows (NOTES 4).
SMALL_VAE = dict(clip=100.0, ema=0.9999, batch=64, steps=1500)
SMALL_UNET = dict(channels=24, multipliers=(1, 2), blocks=1, attention=(), heads=4, dropout=0.0)
SMALL = {
    'both': BOTH | dict(data='shapes', alpha=0.1, lr=2e-3, warmup=100),
    1: STAGE_1 | SMALL_VAE,
    2: STAGE_2 | SMALL_UNET | dict(batch=32, steps=2000),
}
CIFAR10 = paper('cifar10', 32, 50_000, (500, 128), (2850, 256), (1, 2, 2, 2), (16,), dropout=0.3)
CELEBA = paper('celeba', 64, 162_770, (245, 32), (500, 128), (1, 2, 2, 2, 4), (4,))
HQ = dict(data='celebahq', images=30_000, lr=2e-5, flip=True)  # --data: your folder of the images
HQ128 = paper(
    size=128, vae=(500, 42), ddpm=(1000, 64), multipliers=(1, 2, 2, 3, 4), attention=(8,), **HQ
)
HQ256 = paper(
    size=256, vae=(500, 16), ddpm=(1000, 64), multipliers=(1, 1, 2, 2, 4, 4), attention=(16,), **HQ
)
PRESETS = {
    'small': SMALL,
    'cifar10': CIFAR10,
    'celeba64': CELEBA,
    'celebahq128': HQ128,
    'celebahq256': HQ256,
}

# The VAEs of the paper's presets: blocks of encoder and decoder, and channels, by resolution.
PAPER_VAES = {
    'cifar10': (
        {32: 7, 16: 4, 8: 4, 4: 3, 1: 3},
        {1: 1, 4: 2, 8: 3, 16: 7, 32: 15},
        {32: 64, 16: 128, 8: 256, 4: 256, 1: 512},
    ),
    'celeba64': (
        {64: 7, 32: 4, 16: 7, 8: 3, 4: 3, 1: 2},
        {1: 1, 4: 2, 8: 3, 16: 7, 32: 8, 64: 10},
        {64: 64, 32: 128, 16: 256, 8: 256, 4: 256, 1: 512},
    ),
    'celebahq128': (
        {128: 1, 64: 3, 32: 3, 16: 7, 8: 3, 4: 3, 1: 2},
        {1: 1, 4: 2, 8: 2, 16: 6, 32: 2, 64: 2, 128: 1},
        {128: 64, 64: 64, 32: 128, 16: 128, 8: 256, 4: 512, 1: 1024},
    ),
    'celebahq256': (
        {256: 3, 128: 3, 64: 5, 32: 7, 16: 9, 8: 7, 4: 5, 1: 2},
        {1: 2, 4: 4, 8: 6, 16: 8, 32: 5, 64: 4, 128: 2, 256: 2},
        {256: 64, 128: 64, 64: 64, 32: 128, 16: 128, 8: 256, 4: 512, 1: 1024},
    ),
}


@dataclass
class TrainingOptions:
    """All settings of a training run; its checkpoint keeps them.

    None means: as the checkpoint says, else as the preset says; `resolve` fills it in. What stays
    None: settings of the other stage, and `out` and `device` where they were not typed; `grey` and
    `precision`, until `train` has seen the images and the device.
    """

    stage: int = option('1 trains the VAE, 2 the diffusion model', choices=(1, 2))
    form: str = option('formulation of stage 2, or uncond, the baseline', choices=FORMS)
    preset: str = option("small is ours, the others are the paper's", choices=PRESETS)
    data: str = option(f'{", ".join(DATA_SETS)} (needs gdown), or a folder')
    root: str = option('folder where the files of a named set are, or go', free=True)
    grey: bool = option('whether images have one channel: found by looking', commands=())
    out: str = option('folder of the run (default runs/<data>)', free=True)
    size: int = option('height and width of the images (default 32; celeba 64)', low=16, high=4096)
    flip: bool = option('mirror images at random (default in stage 2; never mnist, fashion)')
    z_dim: int = option('numbers in the code z (default size^2 / 64)', low=1, high=65536)
    alpha: float = option('VAE: weight of the KL', low=0, high=1e9)
    signal: str = option('what the VAE models of an image', choices=SIGNALS)
    timesteps: int = option('T; below 500 y_T is not yet noise', low=100, high=10_000)
    channels: int = option('U-Net: channels of its stem', low=4, high=65536)
    multipliers: tuple = option('U-Net: multiplier of the channels, for each level')
    blocks: int = option('U-Net: residual blocks a level', low=1, high=100)
    attention: tuple = option(
        'U-Net: resolutions that attend, e.g. 16,8 (default: the middle only)'
    )
    heads: int = option('U-Net: heads of its attention', low=1, high=65536)
    dropout: float = option('U-Net: dropout in its blocks', low=0, high=0.99)
    z_cond: bool = option('U-Net: show it z besides the draft')
    cond_drop: float = option('share of images without draft, for guidance', low=0, high=0.99)
    precision: str = option('of the U-Net (default: the fast one)', choices=('float32', 'bfloat16'))
    steps: int = option('training steps; a larger number extends a run', low=1, free=True)
    batch: int = option('images a step, of all processes', low=1, high=1_000_000)
    lr: float = option("Adam's learning rate", low=0, high=1)
    warmup: int = option('steps over which the learning rate rises', low=1)
    clip: float = option('largest norm of the gradient; inf for none', low=1e-6, high=math.inf)
    ema: float = option('decay of the averaged weights; 0 for none', low=0, high=1)
    seed: int = option('seed of weights, batches and noise', low=0)
    device: str = option('cpu, cuda, cuda:1, mps (default: cuda if there is one)', free=True)
    save_every: float = option('seconds between checkpoints', low=0, free=True)


# What stage 2 takes over from stage 1, with the VAE itself.
INHERITED = ('preset', 'data', 'root', 'grey', 'size', 'z_dim', 'alpha', 'signal')


def vae_layout(options):
    """Blocks of encoder and decoder, and channels, by resolution: what `VAE` is built of.

    Raises UserError for a size that the preset cannot have.
    """
    if options.preset == 'small':
        # This VAE does little where there are many pixels: the encoder pools from `size` to 8 at
        # once. (With --size 16 the keys 16 and `size` are one, and the later entry counts.)
        if options.size % 16:
            below = options.size // 16 * 16
            raise UserError(f'--size {options.size}: no multiple of 16, as {below} or {below + 16}')
        encoder = {options.size: 0, 8: 1, 4: 2, 1: 1}
        decoder = {1: 1, 4: 3, 8: 2, 16: 1, options.size: 0}
        return encoder, decoder, {options.size: 16, 16: 32, 8: 64, 4: 128, 1: options.z_dim}

    encoder, decoder, widths = PAPER_VAES[options.preset]
    if options.size not in encoder:
        raise UserError(f'--size {options.size}: --preset {options.preset} has {max(encoder)}')
    return encoder, decoder, widths | {1: options.z_dim}


def flag(name):
    """The option of a field, as it is typed: z_dim -> --z-dim."""
    return '--' + name.replace('_', '-')


def resolve(typed, before, path):
    """Complete the `TrainingOptions` typed: from a checkpoint, else from a preset.

    before: settings of the checkpoint at `path` to go on from, of this stage or of stage 1, or {}.
    Raises UserError where `typed` contradicts them, or has what the run would ignore.
    """
    stage = typed.stage
    given = {name: value for name, value in asdict(typed).items() if value is not None}
    if 'data' in given:
        given['data'] = full_path(given['data'])

    # A run that goes on keeps its settings; stage 2 takes over those of the VAE.
    kept = before
    if before.get('stage') != stage:
        kept = {name: before[name] for name in INHERITED if name in before}

    # From weak to strong: the preset, the checkpoint, the command line.
    preset = given.get('preset') or kept.get('preset') or 'small'
    defaults = {'stage': stage, 'preset': preset, 'out': None, 'device': None}
    defaults |= PRESETS[preset]['both'] | PRESETS[preset][stage]
    settings = defaults | kept | given

    # The run may go on from another working directory: paths are kept in full.
    settings['data'] = full_path(settings['data'])
    settings['root'] = str(Path(settings['root']).resolve())

    # Some settings follow from others.
    if not data_set(settings['data']).mirror:
        settings['flip'] = False
    if settings.get('grey') is None:
        settings['grey'] = data_set(settings['data']).grey
    if 'size' not in settings:
        settings['size'] = data_set(settings['data']).size
    if 'z_dim' not in settings and preset == 'small':
        settings['z_dim'] = settings['size'] ** 2 // 64
    elif 'z_dim' not in settings:
        _, _, widths = PAPER_VAES[preset]
        settings['z_dim'] = widths[1]

    refuse_contradictions(given, kept, path)
    refuse_what_is_ignored(given, defaults, settings)
    return TrainingOptions(**settings)


def refuse_contradictions(given, kept, path):
    """Raise a UserError if an option would change what is fixed in the checkpoint at `path`."""
    free = [setting.name for setting in fields(TrainingOptions) if setting.metadata['free']]
    for name, value in given.items():
        if name not in kept or name in free or value == kept[name]:
            continue
        if name == 'data' and is_moved(kept['data'], value):
            continue
        raise UserError(f'{flag(name)} {value}: {path} has {kept[name]}')


def is_moved(old, new):
    """Whether `new` can be the folder that was at `old`: there is none any more."""
    return old not in DATA_SETS and new not in DATA_SETS and not Path(old).exists()


def refuse(given, names, why):
    """Raise a UserError if one of the options `names` was given: it would be ignored.

    A switch that is off, such as --no-flip, asks for nothing, and is let through.
    """
    for name in names:
        if name in given and given[name] is not False:
            raise UserError(f'{flag(name)}: {why}')


def refuse_what_is_ignored(given, defaults, settings):
    """Raise a UserError if an option is of the other stage, of another form or data set."""
    data = settings['data']
    others = [name for name in given if name not in defaults and name not in INHERITED]
    refuse(given, others, f'is a setting of stage {3 - settings["stage"]} only')
    if settings.get('form') == 'uncond':
        of_the_vae = ('z_dim', 'alpha', 'signal', 'z_cond', 'cond_drop')
        refuse(given, of_the_vae, '--form uncond has no VAE, no draft and no z')
    if not data_set(data).rooted:
        refuse(given, ('root',), f'--data {data} is not read from there')
    if not data_set(data).mirror:
        refuse(given, ('flip',), f'images of --data {data} are never mirrored')


# The commands in which the user chooses one kind of chain (`evaluate` compares several), and those
# that draw z from the prior.
CHAINS = ('sample', 'reconstruct', 'chain', 'interpolate', 'edit', 'robust')
PRIOR = ('sample', 'evaluate')


@dataclass
class SamplingOptions:
    """All settings of the commands that generate images."""

    out: str = option('folder of the run', 'runs/shapes')
    form: str = option('which model (default: the first there is; evaluate: all)', choices=FORMS)
    data: str = option('the folder of the training images, if it has moved')
    root: str = option('as for train, if it has moved')
    num: int = option(
        'how many images (default: sample 64; evaluate 500, for its bound 200; edit 9; chain 2; '
        'others 8)',
        low=1,
    )
    steps: int = option('steps, a network call each (two if guided)', 50, low=1, commands=CHAINS)
    sampler: str = option('update rule', 'ddpm', choices=SAMPLERS, commands=CHAINS)
    spacing: str = option('of the times', 'quadratic', choices=SPACINGS, commands=CHAINS)
    variance: str = option('variance of a ddpm step', 'small', choices=VARIANCES)
    eta: float = option('noise of a ddim step; 1: as ddpm', 0.0, low=0, high=1)
    temperature: float = option('scale of the starting noise y_T', 1.0, low=0, high=1000)
    guidance: float = option('its weight, for models with --cond-drop', 0.0, low=0, high=100)
    shared_noise: bool = option('the same noise for all images', False, commands=PRIOR)
    gmm: int = option('Ex-PDE: z from a mixture of K Gaussians', low=1, commands=PRIOR)
    seed: int = option('seed of z and noise', 0, low=0)
    png: str = option('folder for single images instead of a grid', commands=('sample',))
    real: bool = option('with --png: the training images', False, commands=('sample',))
    calls: tuple = option('network calls an image', (5, 10, 25), commands=('evaluate',))
    seeds: int = option('seeds, from --seed on', 2, low=2, high=1000, commands=('evaluate',))
    bits: bool = option('the bound on -log2 p(x) instead', False, commands=('evaluate',))
    attribute: str = option(
        'kind=circle, size>0.5, digit=3, Smiling; a folder has none', commands=('edit',)
    )
    device: str = option('as for train')


# Options that are of use only where a chain, or z from the prior, is drawn.
OF_THE_CHAIN = ('steps', 'sampler', 'spacing', 'variance', 'eta', 'temperature', 'guidance')
OF_THE_PRIOR = ('shared_noise', 'gmm')


def changed(options):
    """Those of the `SamplingOptions` that are not the default: {name: value}."""
    default = asdict(SamplingOptions())
    return {name: value for name, value in asdict(options).items() if value != default[name]}


def check_sampling(command, options):
    """Raise a UserError if the command would ignore an option, alone or beside the others.

    An option with its default value is not noticed.
    """
    if int(os.environ.get('WORLD_SIZE', 1)) > 1 and not options.png:
        raise UserError('of several processes only train and sample --png share the work')
    given = changed(options)
    if options.real:
        ignored = (*OF_THE_CHAIN, *OF_THE_PRIOR, 'seed')
        refuse(given, ignored, 'not with --real, which only copies training images')
    elif command == 'sample' and options.gmm is None:
        refuse(given, ('data', 'root'), 'sample reads images for --real and --gmm only')
    if options.bits:
        ignored = (*OF_THE_CHAIN, *OF_THE_PRIOR, 'calls', 'seeds')
        refuse(given, ignored, 'not with --bits, the bound for z ~ N(0, I) and all T ddpm steps')
    if command in CHAINS and options.sampler != 'ddpm':
        refuse(given, ('variance',), 'is of --sampler ddpm')
    if command in CHAINS and options.sampler != 'ddim':
        refuse(given, ('eta',), 'is of --sampler ddim')


def check_model(options, settings, path):
    """Raise a UserError if the trained model at `path` cannot do what the options ask for.

    settings: its `TrainingOptions`; their `data` and `root` become those of the options.
    """
    if options.steps > settings.timesteps:
        raise UserError(f'--steps {options.steps}: from 1 to T = {settings.timesteps}')
    if settings.form == 'uncond':
        refuse(changed(options), ('guidance',), '--form uncond has no draft; give --form 1 or 2')
    elif not settings.cond_drop:
        refuse(changed(options), ('guidance',), f'{path} was trained without --cond-drop')
    if options.root is not None:
        if not data_set(settings.data).rooted:
            raise UserError(f'--root: --data {settings.data} is not read from there')
        settings.root = options.root
    if options.data is not None:
        data = full_path(options.data)
        if data != settings.data and not is_moved(settings.data, data):
            raise UserError(f'--data {options.data}: {path} was trained on {settings.data}')
        settings.data = data


# ==== 7. TRAINING, one loop for both stages =======================================================
# A stage is a module: `forward` returns its loss, `random_inputs` draws what a step needs. Whatever
# is random in step s is a function of (seed, s) alone (of several processes, each has dropout masks
# of its own). So a run that is interrupted and resumed makes the same weights as one that is not:
# on a CPU with as many threads bit for bit.


def cpu_has_fast_bfloat16():
    """Whether this CPU multiplies bfloat16 in hardware, and fast; only Linux tells."""
    try:
        cpu = Path('/proc/cpuinfo').read_text()
    except OSError:
        return False
    return 'amx_bf16' in cpu or ('avx512_bf16' in cpu and 'AuthenticAMD' in cpu)


class Machine(NamedTuple):
    """Where a command runs: torchrun starts `world` processes, of which this one is `rank`."""

    device: torch.device
    precision: str  # the fast one on this device: 'float32' or 'bfloat16'
    rank: int
    world: int


def choose_machine(name):
    """The `Machine` for a device's name; by default CUDA if there is one. UserError if it fails."""
    if name in (None, 'cuda'):
        cuda = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
        name = cuda if name == 'cuda' or torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {name}: not on this machine; cpu always is') from error

    # bfloat16 is fast where there are units for it; emulated it is slower than float32 (NOTES 4).
    # float32 means float32: TF32 would have an error of 0.05%, which `predict_x0` makes 8%.
    fast = False
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == 'cpu':
        fast = cpu_has_fast_bfloat16()
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    rank = int(os.environ.get('RANK', 0))
    world = int(os.environ.get('WORLD_SIZE', 1))
    return Machine(device, 'bfloat16' if fast else 'float32', rank, world)


def build(options):
    """The module of a stage with fresh weights: a VAE for stage 1, a DiffuseVAE for stage 2."""
    channels = 1 if options.grey else 3
    vae = None
    if options.stage == 1 or options.form != 'uncond':
        encoder, decoder, widths = vae_layout(options)
        vae = VAE(channels, options.size, encoder, decoder, widths, options.alpha, options.signal)
    if options.stage == 1:
        return vae.to(memory_format=torch.channels_last)

    unet = UNet(
        in_channels=channels if vae is None else 2 * channels,
        out_channels=channels,
        size=options.size,
        channels=options.channels,
        multipliers=options.multipliers,
        blocks=options.blocks,
        attention=options.attention,
        heads=options.heads,
        dropout=options.dropout,
        z_dim=vae.z_dim if options.z_cond else 0,
        bfloat16=options.precision == 'bfloat16',
    )
    model = DiffuseVAE(
        vae=vae,
        unet=unet,
        diffusion=Diffusion(options.timesteps),
        form=options.form,
        cond_drop=options.cond_drop,
    )
    return model.to(memory_format=torch.channels_last)  # the faster layout, on CPUs and GPUs


def name_of(form):
    """A form in the names of files and rows: form1, form2 or uncond."""
    return form if form == 'uncond' else f'form{form}'


def checkpoint_path(out, stage, form):
    """Where the checkpoint of a stage and form is."""
    return Path(out) / ('stage1.pt' if stage == 1 else f'stage2-{name_of(form)}.pt')


def load_checkpoint(out, stage, form=None):
    """(path, content) of a checkpoint; the content is on the CPU, and None if there is no file.

    UserError if the file is damaged, or of another stage, form or version of this program.
    """
    path = checkpoint_path(out, stage, form)
    if not path.exists():
        return path, None
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)  # data, never code
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises nearly anything on a damaged file
        raise UserError(f'{path}: damaged, or not a checkpoint; move it away') from error

    parts = {'options', 'model', 'ema', 'optimizer', 'step', 'rows'}
    names = {setting.name for setting in fields(TrainingOptions)}
    options = saved.get('options') if isinstance(saved, dict) else None
    if not isinstance(options, dict) or set(saved) != parts or set(options) != names:
        raise UserError(
            f'{path}: of another version of this program: move it away, or use that version'
        )
    if options['stage'] != stage or (stage == 2 and options['form'] != form):
        name = 'stage 1' if stage == 1 else f'stage 2 form {form}'
        raise UserError(f'{path}: not a checkpoint of {name}; move it away')
    return path, saved


def load_weights(model, weights, path):
    """Put weights {name: tensor} into the model, or a UserError if they are not its own."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in weights.items()}:
        raise UserError(f'{path}: its weights do not fit its settings; move it away')
    model.load_state_dict(weights)


def initialise(options, parent, parent_path, images):
    """The model at step 0. Its weights are a function of the seed; the VAE's are stage 1's."""
    torch.manual_seed(options.seed)
    model = build(options)
    if options.stage == 1:
        # The small VAE trains for minutes: with He's initial weights its blocks contribute from the
        # start, and places are learnt sooner (NOTES 4). The paper's presets keep torch's.
        for block in model.modules():
            if isinstance(block, VAEBlock) and options.preset == 'small':
                for conv in block.convs:
                    nn.init.kaiming_normal_(conv.weight)

        # The encoder sees colours relative to the mean colour, and the decoder starts from it.
        # Where most pixels are black, or white, training would else begin with driving the last
        # sigmoid to where it is flat, and the code would die before it says anything (NOTES 4).
        n = min(len(images), 1000, 10**8 // options.size**2)  # at most 1.2 GB
        y = model.signal(images.batch(range(n)))
        mean = y.mean(dim=(0, 2, 3)).clamp(0.01, 0.99)  # [channels]
        model.mean_colour.copy_(rearrange(mean, 'c -> c 1 1'))
        model.head.bias.data.copy_(torch.logit(mean))
    elif model.vae is not None:
        load_weights(model.vae, parent['ema'], parent_path)
    return model


def training_inputs(model, images, options, step, machine):
    """This process's share of the inputs of a step, on its device: {argument of forward: tensor}.

    The whole batch is a function of (seed, step), whatever the number of processes.
    """
    # Draw the batch: which images, which of them mirrored, and what the module asks for. Images are
    # drawn with replacement: without epochs a step depends on no step before it.
    generator = make_generator(options.seed, 'step', step)
    indices = torch.randint(len(images), (options.batch,), generator=generator)
    mirrored = torch.rand(options.batch, 1, 1, 1, generator=generator) < 0.5 * options.flip
    inputs = model.random_inputs(options.batch, generator)

    # Of `world` processes each takes every world-th image.
    share = slice(machine.rank, None, machine.world)
    x = images.batch(indices[share])
    x = torch.where(mirrored[share], x.flip(3), x)
    inputs = {'x': x} | {name: tensor[share] for name, tensor in inputs.items()}
    return {name: tensor.to(machine.device) for name, tensor in inputs.items()}


def training_step(model, optimizer, inputs, clip):
    """One step of Adam. Returns the losses and the gradient's norm: [len(metrics) + 1]."""
    losses = model(**inputs)
    optimizer.zero_grad()
    losses[0].backward()

    # A gradient that is much longer than usual, from a rare batch, is cut to the length `clip`.
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]['params'], clip)
    optimizer.step()
    return torch.stack([*losses, norm]).detach()


def ema_update(averages, parameters, step, decay):
    """Move averages towards parameters, lists of tensors, in place, after step 0, 1, 2, ..."""
    # average <- d average + (1 - d) parameter,  d = min(decay, (1 + step) / (10 + step))
    #
    # Adam's last weights jump about a minimum; their average lies nearer to its middle, and samples
    # better. With 0.9999 from the start, 37% of the random initial weights would be left in it
    # after 10,000 steps: so the decay rises to its value.
    d = min(decay, (1 + step) / (10 + step))
    for average, parameter in zip(averages, parameters):
        average.lerp_(parameter.detach(), 1 - d)


class TrainingRun:
    """A run of a stage: the model, its averaged copy, the optimiser, and how far it has come.

    saved: the content of the checkpoint at `path` to go on from, or None.
    """

    def __init__(self, options, path, machine, model, saved):
        self.options = options
        self.path = path
        self.machine = machine
        self.model = model
        self.averaged = copy.deepcopy(model).requires_grad_(False).eval()
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=options.lr, fused=True)
        self.step = 0
        self.rows = []  # the table of losses
        if saved is not None:
            load_weights(self.model, saved['model'], path)
            load_weights(self.averaged, saved['ema'], path)
            self.optimizer.load_state_dict(saved['optimizer'])
            self.step = saved['step']
            self.rows = saved['rows']
        self.saved_step = self.step

    def save(self, shown):
        """Write the checkpoint, the table of losses, and a picture of what has been learnt.

        shown: held-out images [n, C, H, W], on the device, for the picture of stage 1.
        """
        content = {
            'options': asdict(self.options),
            'model': self.model.state_dict(),
            'ema': self.averaged.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'step': self.step,
            'rows': self.rows,
        }
        write_atomically(self.path, lambda file: torch.save(content, file))
        self.saved_step = self.step
        header = ['step', *self.model.metrics, 'grad_norm', 'lr', 'images_per_s']
        or_warn(write_table, self.path.with_suffix('.csv'), [header, *self.rows])

        # Stage 1: what the VAE models of held-out images, above their drafts. Stage 2: drafts above
        # refined samples.
        if self.options.stage == 1:
            y = self.averaged.signal(shown)
            mu, _ = self.averaged.encode(shown)
            pictures = {self.options.signal: y, 'draft': self.averaged.decode(mu)}
        else:
            pictures = sample_chunk(self.averaged, SamplingOptions(), chunk=0, n=16)  # section 8
        picture = self.path.with_suffix('.png')
        or_warn(write_grid, picture, list(pictures.items()), self.options.data)

    def train(self, images, shown, progress):
        """The loop: from the step where the run is to the last one."""
        options = self.options
        model = self.model
        if self.machine.world > 1:
            # Every process has all weights; the gradients are averaged over the processes.
            dist.init_process_group('nccl' if self.machine.device.type == 'cuda' else 'gloo')
            model = nn.parallel.DistributedDataParallel(model)

        first = self.step
        losses = []
        started = time.monotonic()
        saved_at = started
        for step, inputs in self.inputs_of_all_steps(images):
            # Dropout draws from torch's own generator.
            torch.manual_seed(seed_of(options.seed, 'dropout', step, self.machine.rank))

            # Adam divides a gradient by its usual size, which it does not know yet in the first
            # steps: the learning rate rises to its value, lest those steps be wild.
            lr = options.lr * min(1, (step + 1) / options.warmup)
            self.optimizer.param_groups[0]['lr'] = lr

            # Forward, backward and a step of Adam; the averaged weights follow.
            losses.append(training_step(model, self.optimizer, inputs, options.clip))
            averages = list(self.averaged.parameters())
            ema_update(averages, list(self.model.parameters()), step, options.ema)

            # Every ten steps and at the end: a row of the table, and a line of progress.
            self.step = step + 1
            finished = self.step == options.steps
            if self.step % 10 != 0 and not finished:
                continue
            values = torch.stack(losses)  # [steps, len(metrics) + 1]
            losses = []
            self.require_finite(values)
            self.warn_of_an_empty_code(values)
            rate = (self.step - first) / (time.monotonic() - started)
            means = values.mean(dim=0).tolist()
            self.rows.append([self.step, *means, lr, round(rate * options.batch, 1)])
            progress.show(self.describe(rate), end=finished)

            # From time to time a checkpoint: a kill costs what has been trained since the last.
            due = finished or time.monotonic() - saved_at > options.save_every
            if due and self.machine.rank == 0:
                self.save(shown)
                saved_at = time.monotonic()
        if self.machine.world > 1:
            dist.destroy_process_group()

    def inputs_of_all_steps(self, images):
        """Generate (step, inputs) from the step where the run is to the last one.

        Inputs are a function of (seed, step) alone. So a thread can prepare those of the next step,
        which may be read from files, while the device computes this one.
        """

        def inputs_of(step):
            return training_inputs(self.model, images, self.options, step, self.machine)

        last = self.options.steps - 1
        with ThreadPoolExecutor(max_workers=1) as thread:
            coming = thread.submit(inputs_of, self.step)
            for step in range(self.step, last + 1):
                inputs = coming.result()
                if step < last:
                    coming = thread.submit(inputs_of, step + 1)
                yield step, inputs

    def warn_of_an_empty_code(self, values):
        """Stage 1: say so, at step 300 and at a later end, if all images have the same code.

        values: losses and gradient norms of the last steps, [steps, len(metrics) + 1].
        """
        last = max(300, self.options.steps)
        if self.options.stage == 2 or self.step not in (300, last):
            return
        kl = values[:, self.model.metrics.index('kl')].mean().item()
        if kl < 0.05:
            warn(
                f'step {self.step}: the code carries nothing (KL {kl:.2g}): all drafts are the '
                'same mean picture; more --steps or a smaller --alpha may help, unless the images '
                'are all alike'
            )

    def require_finite(self, values):
        """Raise a FloatingPointError at a loss or a gradient that is nan or infinite.

        The weights in memory are lost then; the last checkpoint stays.
        """
        finite = values.isfinite().all(dim=1).tolist()
        if all(finite):
            return
        bad = self.step - len(finite) + 1 + finite.index(False)
        anew = f'{self.path} is good, of step {self.saved_step}: move it away and start anew'
        if self.saved_step == 0:
            anew = 'nothing was saved before: start anew'
        raise FloatingPointError(
            f'step {bad}: loss or gradient not finite; {anew}, with a lower --lr or --clip'
        )

    def describe(self, rate):
        """The line of progress, from the newest row of the table; rate: steps a second."""
        losses = zip(self.model.metrics, self.rows[-1][1:])
        losses = '  '.join(f'{name} {value:.4g}' for name, value in losses)
        minutes = (self.options.steps - self.step) / rate / 60
        images = f'{rate * self.options.batch:.0f} images/s  {minutes:.1f} min left'
        return f'step {self.step}/{self.options.steps}  {losses}  {images}'


def load_both(options, progress):
    """The training and the held-out images. Completes `options.grey`, by looking at them."""
    data = f'--data {options.data}'
    images = load_images(options, train=True)
    held_out = load_images(options, train=False)
    if options.grey is None:
        options.grey = is_grey(images) and is_grey(held_out)
        if options.grey:
            progress.show(f'{data}: grey images, of one channel', end=True)
            images.make_grey()
            held_out.make_grey()
    if options.grey and options.signal == 'grey':
        raise UserError(f'--signal grey: the images of {data} are grey already')
    count = f'{len(images)} training and {len(held_out)} held-out images'
    progress.show(f'{data}: {count}', end=True)
    return images, held_out


def train(typed):
    """The command `train`: start, resume or extend a run of a stage. Returns the exit code."""
    stage = typed.stage
    form = typed.form or '1'
    data = typed.data or PRESETS[typed.preset or 'small']['both']['data']
    out = typed.out or f'runs/{Path(data).resolve().name}'  # so stage 2, too, needs --data or --out
    machine = choose_machine(typed.device)
    progress = Progress()

    # Where the run starts: at its own checkpoint, else, in stage 2, at that of stage 1.
    path, saved = load_checkpoint(out, stage, form)
    source = path
    parent = None
    if stage == 2 and saved is None:
        source, parent = load_checkpoint(out, 1)
        if parent is None and form != 'uncond':
            raise UserError(f'no {source}: first train --stage 1, or give its --data or --out')
    if parent and form != 'uncond' and parent['step'] < parent['options']['steps']:
        progress.show(f'note: {source} is not complete; its VAE is used as it is', end=True)
    before = saved or parent
    options = resolve(typed, before['options'] if before else {}, source)
    if stage == 2 and options.precision is None:
        options.precision = machine.precision
    if options.batch % machine.world:
        raise UserError(f'--batch {options.batch}: {machine.world} processes cannot share it')

    done = saved['step'] if saved else 0
    if options.steps <= done:
        progress.show(f'{path} is complete: {done} steps; a larger --steps extends it', end=True)
        return 0

    # What cannot be built or written should fail now, not after all pictures have been read.
    build(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    how = f'on {machine.device} in {options.precision or "float32"}'
    progress.show(f'{path}: steps {done} to {options.steps} {how}', end=True)

    images, held_out = load_both(options, progress)
    shown = held_out.batch(range(min(16, len(held_out)))).to(machine.device)
    model = build(options) if saved else initialise(options, parent, source, images)
    run = TrainingRun(options, path, machine, model.to(machine.device), saved)
    try:
        run.train(images, shown, progress)
    except KeyboardInterrupt:
        state = f'{path} holds step {run.saved_step}' if run.saved_step else 'nothing was saved yet'
        progress.show(f'interrupted: {state}; the same command goes on', end=True)
        return 130
    progress.show(f'{path} is complete; look at {path.with_suffix(".png")}', end=True)
    return 0


# ==== 8. SAMPLING =================================================================================
# z ~ N(0, I), x_hat = decoder(z), then the reverse chain. Images are drawn in chunks of 64. What is
# random in a chunk is a function of (seed, chunk): so image i is the same, up to rounding, however
# many are drawn.

CHUNK = 64


class Trained(NamedTuple):
    """A trained model with its averaged weights, its settings, and the path of its checkpoint.

    Images and codes that its methods take and return are on the CPU, images [n, C, H, W] in [0, 1].
    """

    model: DiffuseVAE
    settings: TrainingOptions
    path: Path

    def images(self, train):
        """The training or the held-out images: an object with a length and `batch(indices)`."""
        return load_images(self.settings, train)

    def encode(self, images):
        """The mean codes of images: [n, z_dim]. UserError for the baseline, which has no codes."""
        self.require_codes()
        mu, _ = encode_batches(self.model, images.split(CHUNK))
        return mu

    def require_codes(self):
        """Raise a UserError if there is no VAE."""
        if self.model.vae is None:
            raise UserError(f'{self.path}: --form uncond has no codes')

    def generate(self, num=8, z=None, seed=0, steps=50, sampler='ddpm'):
        """(drafts, refined images) of num codes from the prior, or of given codes z [n, z_dim].

        Codes from the prior get a noise each; given ones share one, so that z is their only
        difference. Drafts are None for the baseline. UserError for steps or a sampler that there
        is not, and for codes where the model has none.
        """
        options = SamplingOptions(seed=seed, steps=steps, sampler=sampler)
        check_model(options, self.settings, self.path)
        if z is not None:
            self.require_codes()
            num = len(z)
        if num < 1:
            raise UserError(f'{num} images: at least one')

        def draw(chunk, n):
            if z is None:
                return sample_chunk(self.model, options, chunk, n)
            codes = z[chunk * CHUNK : chunk * CHUNK + n]
            return paint(self.model, options, codes, same_noise(self.model, options))

        images = draw_chunks(draw, num, Progress(after=3))
        return images.get('draft'), images['refined']

    def write_picture(self, name, rows, columns=()):
        """Write rows [(label, images)] beside the checkpoint, and say where."""
        path = self.path.with_name(f'{name}-{name_of(self.settings.form)}.png')
        write_grid(path, list(rows), self.settings.data, columns)
        print(path)


def encode_batches(model, batches):
    """(mu, logvar), each [N, z_dim] on the CPU, of all images in batches [n, C, H, W]."""
    encoded = [model.vae.encode(x.to(model.device)) for x in batches]
    mu = torch.cat([mu for mu, _ in encoded]).cpu()
    logvar = torch.cat([logvar for _, logvar in encoded]).cpu()
    return mu, logvar


def encode_all(trained, images):
    """(mu, logvar), each [N, z_dim], of a whole set of images."""
    chunks = torch.arange(len(images)).split(CHUNK)
    return encode_batches(trained.model, (images.batch(indices) for indices in chunks))


def draw_chunks(draw, num, progress=None):
    """Images 0 to num - 1, chunk by chunk: {name: [num, C, H, W]}.

    draw(chunk, n): the first n images of a chunk, by name.
    """
    parts = []
    for chunk, first in enumerate(range(0, num, CHUNK)):
        end = min(num, first + CHUNK)
        parts.append(draw(chunk, end - first))
        if progress is not None:
            progress.show(f'{end}/{num} images', end=progress.open and end == num)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def trained_forms(options):
    """The forms of which there is a checkpoint in --out, or --form alone. UserError for none."""
    forms = [options.form] if options.form else FORMS
    found = [form for form in forms if checkpoint_path(options.out, 2, form).exists()]
    if not found:
        path = checkpoint_path(options.out, 2, forms[0])
        raise UserError(f'no {path}: first train --stage 2 --form {forms[0]}, or give --out')
    return found


def load_trained(options, form=None):
    """The `Trained` model of --out and of the form, by default of the first that there is."""
    path, saved = load_checkpoint(options.out, 2, form or trained_forms(options)[0])
    settings = TrainingOptions(**saved['options'])
    check_model(options, settings, path)
    machine = choose_machine(options.device)
    if options.bits or machine.precision == 'float32':
        settings.precision = 'float32'  # a bound should be exact; emulated bfloat16 is slow

    model = build(settings)
    load_weights(model, saved['ema'], path)
    model.requires_grad_(False).eval()  # so nothing below needs torch.no_grad
    model.to(machine.device)
    return Trained(model, settings, path)


def load(out='runs/shapes', form=None, device=None):
    """The `Trained` model in the folder of a run, for a notebook; by default the first form.

    UserError if there is none. If its images have moved, set `settings.data` of what it returns.
    """
    return load_trained(SamplingOptions(out=out, form=form, device=device))


def noise_source(model, generator, n):
    """A function that draws fresh noise [n, C, H, W] at each call."""

    def draw_noise():
        return torch.randn(n, *model.image_shape, generator=generator)

    return draw_noise


def same_noise(model, options, key='shared noise'):
    """A new `noise_source` of one noise for all images, which leaves z as their only difference.

    Each step draws a fresh one. Make a source for each painting: a used one goes on where it is.
    """
    return noise_source(model, make_generator(options.seed, key), 1)


def paint(model, options, z, draw_noise, draft=None, watch=None):
    """Draft and refine: {'draft', 'refined'}, each [n, C, H, W] in [0, 1] on the CPU.

    z: codes [n, z_dim]; draw_noise: a `noise_source` of 1 or at least n noises; draft: in place of
    the decoder's; watch: as for `Diffusion.sample`. Without a VAE only 'refined' is returned.
    """
    z = z.to(model.device)
    if draft is not None:
        draft = draft.to(model.device)

    def draw_for_batch():
        return draw_noise()[: len(z)].to(model.device)

    draft, refined = model.generate(
        z,
        y_T=options.temperature * draw_for_batch().expand(len(z), -1, -1, -1),
        draw_noise=draw_for_batch,
        draft=draft,
        guidance=options.guidance,
        steps=options.steps,
        sampler=options.sampler,
        spacing=options.spacing,
        variance=options.variance,
        eta=options.eta,
        watch=watch,
    )
    images = {} if draft is None else {'draft': draft.cpu()}
    return images | {'refined': refined.cpu()}


def sample_chunk(model, options, chunk, n, mixture=None):
    """`paint` the first n images of a chunk, with z from the prior or a `mixture_of_codes`."""
    generator = make_generator(options.seed, 'chunk', chunk)
    z = torch.randn(CHUNK, model.z_dim, generator=generator)
    if mixture is not None:  # z = m_k + L_k eps for a random component k, with L_k L_k^T = S_k
        weights, means, factors = mixture
        k = torch.multinomial(weights, CHUNK, replacement=True, generator=generator)
        z = means[k] + torch.einsum('nij,nj->ni', factors[k], z)
    if options.shared_noise:
        return paint(model, options, z[:n], same_noise(model, options))
    return paint(model, options, z[:n], noise_source(model, generator, CHUNK))


def sample(options):
    """The command `sample`: a grid of drafts above refined images, or a folder of PNGs."""
    trained = load_trained(options)
    num = options.num or CHUNK
    if options.real:
        sample_real(options, trained, num)
        return
    if num > CHUNK and not options.png:
        raise UserError(f'--num {num}: a grid holds {CHUNK}; --png takes any number')
    mixture = None
    if options.gmm is not None:
        mixture = mixture_of_codes(trained, options.gmm)

    if options.png:
        names = ['drafts', 'refined'] if trained.model.vae is not None else ['refined']

        def draw(chunk, n):
            return sample_chunk(trained.model, options, chunk, n, mixture).values()

        write_folder(options, trained, num, names, draw)
        return

    images = sample_chunk(trained.model, options, 0, num, mixture)
    rows = []
    for first in range(0, num, 16):
        for name, batch in images.items():
            rows.append((name, batch[first : first + 16]))
    trained.write_picture('samples', rows)


def sample_real(options, trained, num):
    """Write training images to a folder, to compare generated ones with (by FID, for example)."""
    images = trained.images(train=True)
    if not options.png or num > len(images):
        raise UserError(f'--real: needs --png FOLDER and a --num up to {len(images)}')

    def batch(chunk, n):
        return [images.batch(range(chunk * CHUNK, chunk * CHUNK + n))]

    write_folder(options, trained, num, ['real'], batch)


def digest_of(model):
    """A text that tells the weights of a model from all others."""
    digest = hashlib.sha256()
    for weights in model.state_dict().values():
        digest.update(weights.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def refuse_other_pictures(note, text, names, num, alone):
    """Raise a UserError if a folder has pictures that `write_folder` would not write.

    note: the file in it that says what it holds; text: what it should say; names, num: see there;
    alone: whether no other process may have begun to write.
    """
    folder = note.parent
    if note.exists() and note.read_text() != text:
        raise UserError(f'--png {folder}: is of other settings; {note} says which')
    for name in names:
        there = len(list((folder / name).glob('*.png')))
        if alone and there and not note.exists():
            raise UserError(f'--png {folder}: has pictures in {name} already; name another folder')
        if there > num:
            raise UserError(f'--png {folder}: has {there} pictures in {name}, --num is {num}')


def write_folder(options, trained, num, names, draw):
    """Write num images of each name, as <folder>/<name>/000000.png and so on.

    draw(chunk, n): the first n images of a chunk, one batch [n, C, H, W] for each name. Files that
    exist are kept, so an interrupted command goes on. Processes of torchrun share the chunks.
    """
    folder = Path(options.png)
    machine = choose_machine(options.device)
    progress = Progress()

    # Images of other settings, or of another model, must not end up in the same folder. Where the
    # files are does not matter, nor does the device, unless it changes the precision.
    elsewhere = dict(out=None, root=None, data=None, device=None)
    if options.real:
        content = {'real': Path(trained.settings.data).name, 'size': trained.settings.size}
    else:
        content = asdict(replace(options, num=None, png=None, form=None, **elsewhere))
        content['model'] = asdict(replace(trained.settings, **elsewhere))
        content['weights'] = digest_of(trained.model)
    text = json.dumps(content, indent=1)
    note = folder / 'settings.json'
    refuse_other_pictures(note, text, names, num, alone=machine.world == 1)
    if machine.rank == 0:
        write_atomically(note, lambda file: file.write(text.encode()))

    chunks = range(machine.rank, math.ceil(num / CHUNK), machine.world)
    for chunk in chunks:
        first = chunk * CHUNK
        end = min(num, first + CHUNK)
        paths = [folder / name / f'{i:06}.png' for name in names for i in range(first, end)]
        if not all(path.exists() for path in paths):
            images = torch.cat(list(draw(chunk, end - first)))
            for path, pixels in zip(paths, to_uint8(images, trained.settings.data)):
                write_png(path, to_pil_image(pixels))
        progress.show(f'{end}/{num} images in {folder}', end=chunk == chunks[-1])


# ==== PART 3: THE PAPER'S CLAIMS ==================================================================
# Few calls suffice, the draft is tolerated when damaged, z controls the image, a better prior gives
# better images: each is a command that draws a picture or prints a table. NOTES 5 has the results.

# ==== 9. WHAT z CONTROLS ==========================================================================
# A code and a noise make an image: z decides the layout, the noise the detail. `reconstruct` and
# `chain` show it, `interpolate` and `edit` change one of the two, `robust` damages the draft in
# between. All start from codes of held-out images.


def slerp(a, b, w):
    """From a (w = 0) to b (w = 1) along the arc between them: tensors of one shape, as vectors."""
    # sin((1 - w) theta) / sin(theta) a + sin(w theta) / sin(theta) b, theta the angle of a and b
    #
    # The mean of two noises has half of the variance that the network was trained on; on the arc
    # it stays (NOTES 2.8). The cosine is clamped, so that parallel vectors work, too.
    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-0.9999, 0.9999)
    theta = cosine.acos()
    return (((1 - w) * theta).sin() * a + (w * theta).sin() * b) / theta.sin()


def load_for_pictures(options, n):
    """A `Trained` model with a VAE, n held-out images [n, C, H, W], their mean codes [n, z_dim].

    Where there are fewer images, they are repeated. UserError for the baseline, or a large --num.
    """
    trained = load_trained(options)
    trained.require_codes()
    if options.num is not None and options.num > CHUNK:
        raise UserError(f'--num {options.num}: up to {CHUNK} in a picture')
    held_out = trained.images(train=False)
    x = held_out.batch([i % len(held_out) for i in range(n)])
    return trained, x, trained.encode(x)


def comparable(trained):
    """What the settings of models must have in common to be compared."""
    return trained.settings.data, trained.settings.size, trained.settings.timesteps


def reconstruct(options):
    """The command `reconstruct`: held-out images, the drafts of their mean codes, and refined."""
    trained, x, mu = load_for_pictures(options, n=options.num or 8)
    model = trained.model
    rows = {'image': x}
    if trained.settings.signal != 'image':
        rows[trained.settings.signal] = model.vae.signal(x)  # what the VAE models of it
    rows |= paint(model, options, mu, same_noise(model, options))
    trained.write_picture('reconstruct', rows.items())


def chain(options):
    """The command `chain`: the forward processes, and the reverse chain, at ten of its times."""
    num = options.num or 2
    trained, x, mu = load_for_pictures(options, n=num)
    runs = [trained]

    # The baseline's chain stands below, for the same noise, if it is of the same images and times.
    # It has no guidance.
    if checkpoint_path(options.out, 2, 'uncond').exists():
        baseline = load_trained(replace(options, guidance=0.0), form='uncond')
        if comparable(baseline) == comparable(trained):
            runs.append(baseline)

    # From left to right: time 0, which is the image, and up to ten of the chain's times. (The
    # chain itself falls through them, from right to left.)
    diffusion = trained.model.diffusion
    times = time_grid(diffusion.T, options.steps, options.spacing)[::-1]
    picked = torch.linspace(0, len(times) - 1, min(len(times), 10)).round().int().tolist()
    columns = ['0'] + [str(times[i] + 1) for i in picked]  # as in formulas: t = 1 ... T

    # Forward: one noise for all times, so that only its share changes. In Formulation 2, x_t is y_t
    # plus the draft from t = 1 on.
    x_0 = 2 * x - 1
    x_hat = 2 * trained.model.vae.decode(mu.to(trained.model.device)).cpu() - 1
    draw_noise = same_noise(trained.model, options, 'forward noise')
    eps = draw_noise()
    forward_1 = [x_0]
    forward_2 = [x_0]
    for i in picked:
        y_t = q_sample(x_0, diffusion.schedule[times[i]], eps)
        forward_1.append(y_t)
        forward_2.append(y_t + x_hat)

    # Reverse: what each chain passes through. It ends in the image, at time 0. (The rows show y_t;
    # for Formulation 2, x_t would be this plus the draft.)
    reverse = [passed_through(run, options, mu, picked) for run in runs]

    # A block of rows for each image; the draft stands below the largest time, towards which
    # Formulation 2's process leads.
    rows = []
    for i in range(num):
        blank = torch.ones(len(picked), *x_0.shape[1:])
        rows.append(('forward 1', row_of(forward_1, i)))
        rows.append(('forward 2', row_of(forward_2, i)))
        rows.append(('draft', torch.cat([blank, row_of([x_hat], i)])))
        for run, (y, estimates) in zip(runs, reverse):
            rows.append((f'{name_of(run.settings.form)} y', row_of(y, i)))
            rows.append(('estimate', row_of(estimates, i)))
    trained.write_picture('chain', rows, columns)


def passed_through(trained, options, z, picked):
    """y_t and the estimates of x_0, two lists of [n, C, H, W]: x_0, then those of rising times.

    z: codes [n, z_dim]; picked: which of the chain's times, counted from the smallest.
    """
    y = []
    estimates = []

    def watch(y_t, x_0):
        y.append(y_t.cpu())
        estimates.append(x_0.cpu())

    draw_noise = same_noise(trained.model, options)
    refined = paint(trained.model, options, z, draw_noise, watch=watch)['refined']
    x_0 = 2 * refined - 1
    y.reverse()
    estimates.reverse()
    return [x_0] + [y[i] for i in picked], [x_0] + [estimates[i] for i in picked]


def row_of(batches, i):
    """The i-th image of each batch [n, C, H, W], as a row: [-1, 1] becomes [0, 1]."""
    return torch.stack([batch[i] + 1 for batch in batches]) / 2


def interpolate(options):
    """The command `interpolate`: from one image's code to another's, and from noise to noise."""
    trained, _, mu = load_for_pictures(options, n=2)
    model = trained.model
    weights = torch.linspace(0, 1, options.num or 8)

    # Between two codes, with the same noise for all.
    z = torch.stack([slerp(mu[0], mu[1], w) for w in weights])
    rows = paint(model, options, z, same_noise(model, options))

    # Between two noises, with the first code: those of every step, since an ancestral chain adds
    # noise in each and forgets y_T.
    one = same_noise(model, options)
    other = same_noise(model, options, 'other noise')

    def between():
        a = one()
        b = other()
        return torch.cat([slerp(a, b, w) for w in weights])

    z = mu[:1].expand(len(weights), -1)
    rows['new noise'] = paint(model, options, z, between)['refined']
    trained.write_picture('interpolate', rows.items(), [f'{w:.2f}' for w in weights])


def has_attribute(labels, text):
    """Which images have an attribute such as kind=circle, digit=3, size>0.5, Smiling: bool [N].

    UserError if the labels have no such attribute, or if it is true of all images or of none.
    """
    if not labels:
        raise UserError('--attribute: the images have no labels; those of a folder never have')

    # A name, a relation and a value; a name alone means that the label is 1.
    name, relation, value = re.fullmatch(r'([^=<>]*)([=<>]?)(.*)', text or '', re.DOTALL).groups()
    try:
        number = KINDS.index(value) if name == 'kind' else float(value or 1)
    except ValueError:
        number = None
    if name not in labels or number is None:
        raise UserError(
            f'--attribute {text or "is missing"}: there are {", ".join(labels)}; kinds are '
            f'{", ".join(KINDS)}, other values numbers'
        )
    if relation == '>':
        has = labels[name] > number
    elif relation == '<':
        has = labels[name] < number
    else:
        has = labels[name] == number
    if has.all() or not has.any():
        raise UserError(f'--attribute {text}: is true of {has.sum()} of {len(has)} images')
    return has


def edit(options):
    """The command `edit`: move codes along the direction of an attribute."""
    trained, _, mu = load_for_pictures(options, n=3)
    images = trained.images(train=True)
    has = has_attribute(images.labels, options.attribute)

    # The direction: from the mean code of the images without the attribute to that of those with.
    all_mu, _ = encode_all(trained, images)
    direction = all_mu[has].mean(dim=0) - all_mu[~has].mean(dim=0)

    strengths = torch.linspace(-2, 2, options.num or 9)
    rows = []
    for code in mu:
        z = code + strengths[:, None] * direction
        draw_noise = same_noise(trained.model, options)
        rows += paint(trained.model, options, z, draw_noise).items()
    trained.write_picture('edit', rows, [f'{strength:+.1f}' for strength in strengths])


def robust(options):
    """The command `robust`: refine a draft that is damaged more and more, in three ways."""
    trained, _, mu = load_for_pictures(options, n=1)
    model = trained.model
    strengths = torch.linspace(0, 1, options.num or 8)
    s = rearrange(strengths, 'n -> n 1 1 1')
    generator = make_generator(options.seed, 'robust')
    draft = model.vae.decode(mu.to(model.device)).cpu()

    # At strength s: noise of deviation s / 2; a blur of 6 s pixels (and 0.01, as 0 is not allowed);
    # a share s of the blocks of 4x4 pixels, replaced by the mean. The diffusion model saw none of
    # them in training. (z stays as it is, for a model that is shown it, too.)
    noisy = (draft + 0.5 * s * torch.randn(draft.shape, generator=generator)).clamp(0, 1)
    blurred = torch.cat([gaussian_blur(draft, 31, 0.01 + 6 * v.item()) for v in strengths])
    height, width = draft.shape[2:]
    block = torch.rand(1, 1, height // 4, width // 4, generator=generator)
    block = F.interpolate(block, size=(height, width))
    missing = draft.where(block >= s, draft.mean())

    rows = []
    z = mu.expand(len(s), -1)
    for name, damaged in (('noise', noisy), ('blur', blurred), ('blocks', missing)):
        draw_noise = same_noise(model, options)
        rows.append((name, damaged))
        rows.append(('refined', paint(model, options, z, draw_noise, damaged)['refined']))
    trained.write_picture('robust', rows, [f'{strength:.2f}' for strength in strengths])


# ==== 10. QUALITY =================================================================================
# A distance between sets of images, a better prior for z, and a bound on the likelihood.


def blur_kernel(x):
    """A blur that is close to a Gaussian, for each channel of x: [C, 1, 5, 5]."""
    row = torch.tensor([1, 4, 6, 4, 1], device=x.device) / 16
    return (row[:, None] * row).expand(x.shape[1], 1, 5, 5)


def halve(x):
    """Blur, and take every second pixel: [N, C, R, R] -> [N, C, R / 2 rounded up, the same]."""
    padded = F.pad(x, (2, 2, 2, 2), 'reflect')
    return F.conv2d(padded, blur_kernel(x), stride=2, groups=x.shape[1])


def double(low, resolution):
    """The way back from `halve`, but for the detail: [N, C, R / 2, R / 2] -> [N, C, R, R].

    resolution: R, which may be odd.
    """
    # Pixel i of the lower level lies on pixel 2 i of the upper one. So its pixels are set there,
    # zeros between them, and blurred; as three of four are zeros, the kernel's values are those of
    # `halve` times four. `conv_transpose2d` does all this. Its padding cuts off four pixels on each
    # side: two of the replicated border and two of the kernel; output_padding makes the resolution
    # even again. (`interpolate` would put pixel i at 2 i + 1/2.)
    padded = F.pad(low, (1, 1, 1, 1), 'replicate')
    return F.conv_transpose2d(
        padded,
        4 * blur_kernel(low),
        stride=2,
        padding=4,
        output_padding=1 - resolution % 2,
        groups=low.shape[1],
    )


def laplacian_pyramid(x):
    """What each halving of the resolution loses, finest first, and the rest: [N, C, R, R] each."""
    # No level has less than 8 pixels a side: patches of 7x7 fit.
    levels = []
    while x.shape[-1] >= 16:
        low = halve(x)
        levels.append(x - double(low, x.shape[-1]))
        x = low
    return [*levels, x]


def sliced_wasserstein(images, real, patches=64, directions=128):
    """The distance of two sets [N, C, R, R] at each level of the Laplacian pyramid, times 1000.

    patches: of each image; directions: on which they are projected. Returns [levels]; ValueError
    for sets of different shapes. Source: Karras et al., 2018. It needs no pretrained network; it is
    not FID, nor comparable.
    """
    # In one dimension the Wasserstein distance of two samples is the mean absolute difference of
    # their sorted values. Patches of 7x7 pixels have 49 C dimensions: so it is averaged over random
    # directions. Both sets are normalised by the real one's mean and deviation: normalised by
    # their own, drifting colours and weak contrast would not show.
    if images.shape != real.shape:
        raise ValueError(f'sets of different shapes: {images.shape} and {real.shape}')
    generator = make_generator('sliced Wasserstein')
    distances = []
    for of_images, of_real in zip(laplacian_pyramid(images), laplacian_pyramid(real)):
        mean = of_real.mean((0, 2, 3), keepdim=True)
        std = of_real.std((0, 2, 3), keepdim=True)
        n, channels, resolution, _ = of_real.shape
        numbers = channels * 49

        # The same places of both sets' images, and the same directions.
        places = resolution - 6  # along each axis
        place = torch.randint(places**2, (n, patches), generator=generator)
        direction = F.normalize(torch.randn(numbers, directions, generator=generator), dim=0)
        projected = []
        for level in (of_images, of_real):
            # All patches, as a view that copies nothing: [n, channels, places, places, 7, 7]. Then
            # the chosen ones: [n, patches, channels, 7, 7].
            windows = ((level - mean) / std).unfold(2, 7, 1).unfold(3, 7, 1)
            chosen = windows[torch.arange(n)[:, None], :, place // places, place % places]
            projected.append(rearrange(chosen, 'n p c y x -> (n p) (c y x)') @ direction)

        a = projected[0].sort(dim=0).values
        b = projected[1].sort(dim=0).values
        distances.append((a - b).abs().mean())
    return 1000 * torch.stack(distances)


def em_step(z, r, ridge=1e-6):
    """One step of EM for a mixture of K Gaussians.

    z: [N, D], in float64; r: responsibilities [N, K]. Returns the mixture (w [K], m [K, D],
    S [K, D, D]) that fits them, its responsibilities for z, and its mean log-likelihood.
    """
    # N_k = sum_n r_nk,  w_k = N_k / N,  m_k = sum_n r_nk z_n / N_k,
    # S_k = sum_n r_nk (z_n - m_k)(z_n - m_k)^T / N_k + ridge I, which else is singular if N_k < D;
    # then r_nk = p(k|z_n) = w_k N(z_n; m_k, S_k) / p(z_n),  p(z_n) = sum_k w_k N(z_n; m_k, S_k),
    # all in logarithms, as the densities underflow (NOTES 2.8).
    w = r.mean(dim=0)
    m = r.T @ z / r.sum(dim=0)[:, None]
    S = torch.stack([torch.cov(z.T, correction=0, aweights=r_k) for r_k in r.T])  # about m_k
    S = S + ridge * torch.eye(z.shape[1]).to(z)

    log_p = [MultivariateNormal(m_k, S_k).log_prob(z) for m_k, S_k in zip(m, S)]
    joint = w.log() + torch.stack(log_p, dim=1)  # log p(z, k): [N, K]
    return (w, m, S), joint.softmax(dim=1), joint.logsumexp(dim=1).mean()


def fit_mixture(z, K, generator, iterations=100, ridge=1e-6):
    """Fit K Gaussians to z [N, D]: (weights, means, covariances), and their mean log-likelihood
    after each iteration."""
    # Start with k-means: every z to its nearest mean, every mean to the middle of its z.
    means = z[torch.randperm(len(z), generator=generator)[:K]]
    for _ in range(10):
        nearest = torch.cdist(z, means).argmin(dim=1)
        r = F.one_hot(nearest, len(means)).to(z)  # [N, K]
        means = r.T @ z / r.sum(dim=0).clamp(min=1)[:, None]

    # Then EM, from responsibilities that are not quite one or zero: no component starts empty.
    r = 0.99 * r + 0.01 / len(means)
    likelihoods = []
    for _ in range(iterations):
        mixture, r, log_p = em_step(z, r, ridge)
        likelihoods.append(log_p.item())
    return mixture, likelihoods


def mixture_of_codes(trained, K):
    """Ex-PDE: (weights [K], means [K, z_dim], Cholesky factors) of Gaussians fitted to the codes.

    Ex-PDE stands for ex-post density estimation. The codes of the training images are not quite
    N(0, I), so some z ~ N(0, I) fall where the decoder was never trained. Codes from a mixture
    fitted to z ~ q(z|x) do so less often.
    """
    trained.require_codes()
    images = trained.images(train=True)
    if len(images) < K:
        raise UserError(f'--gmm {K}: there are {len(images)} training images')
    mu, logvar = encode_all(trained, images)
    generator = make_generator('gmm')
    z = reparameterize(mu, logvar, torch.randn(mu.shape, generator=generator)).double()
    (weights, means, covariances), _ = fit_mixture(z, K, generator)
    return weights.float(), means.float(), torch.linalg.cholesky(covariances).float()


def sum_of_pixels(values):
    """[B, C, H, W] -> [B]."""
    return values.flatten(1).sum(dim=1)


def nats_of_L_0(x_0, mean, std):
    """-log of the mass that a Gaussian has in the bin of each pixel's grey level: [B]."""
    # Grey levels are 2/255 apart; the bins of the darkest and the brightest are open. The mass
    # between two edges is a difference of distribution functions. As a Gaussian is symmetric, each
    # bin is moved to the left of the mean, where both are small numbers that keep their digits.
    # (An open bin stays open towards the far side, since the mean is in [-1, 1].)
    distance = (x_0 - mean).abs()
    high = torch.special.log_ndtr((1 / 255 - distance) / std)
    low = torch.special.log_ndtr((-1 / 255 - distance) / std)
    low = low.where(x_0.abs() < 0.999, -math.inf)  # the darkest and the brightest are at -1 and 1
    return -sum_of_pixels(high + torch.log1p(-(low - high).exp()))


def nats_of_L_t(x_0, predicted_x0, alpha_bar, generator, variance, strata):
    """The sum of L_t in `bound`: [B]. One random t stands for all t of a part of the sum."""
    # t = 1 ... T - 1 here are the times 2 ... T of formulas.
    total = 0
    for part in torch.arange(1, len(alpha_bar)).tensor_split(strata):
        t = part[(len(part) * torch.rand(len(x_0), generator=generator)).long()]

        # The posterior's mean is linear in (x_0, y_t), and both Gaussians have the same y_t. So the
        # difference of their means is the posterior's mean for (error of x_0, 0).
        error = x_0 - predicted_x0(t)
        difference, of_posterior = q_posterior(error, 0, alpha_bar[t], alpha_bar[t - 1])
        of_model = of_posterior
        if variance == 'large':
            of_model = 1 - alpha_bar[t] / alpha_bar[t - 1]
        posterior = Normal(difference, of_posterior**0.5)
        L_t = torch.distributions.kl_divergence(posterior, Normal(0.0, of_model**0.5))
        total = total + len(part) * sum_of_pixels(L_t)
    return total


def bound(model, x, generator, variance='small', strata=20):
    """An estimate of an upper bound of -log p(x), x [B, C, H, W] in [0, 1]: its terms in nats.

    It is unbiased. It draws one z, and for the terms L_2 ... L_T one random t from each of `strata`
    equal parts of this range. Returns {name: [B]}.
    """
    # -log p(x_0) <= KL( q(z|x_0) || p(z) ) + L_T + sum_t L_t + L_0, with the draft of z ~ q(z|x_0)
    #   L_T = KL( q(y_T|x_0) || N(0, I) )
    #   L_t = KL( q(y_{t-1}|y_t, x_0) || p(y_{t-1}|y_t) ), two Gaussians, whose means differ in x_0
    #         only
    #   L_0 = -log p(x_0|y_1), the mass that a Gaussian has in the bin of each pixel; its variance
    #         is that of the posterior at t = 2, since that at t = 1 is 0
    # It holds for z ~ N(0, I) and the ancestral chain (NOTES 2.7). All but the networks and the
    # code's KL is float64.
    alpha_bar = torch.tensor(model.diffusion.schedule, dtype=torch.float64).view(-1, 1, 1, 1)
    x_0 = 2 * x.double() - 1
    terms = {}

    # The code: what it costs to say z.
    x_hat = None
    z = None
    if model.vae is not None:
        mu, logvar = model.vae.encode(x.to(model.device))
        eps = torch.randn(mu.shape, generator=generator).to(mu.device)
        z = reparameterize(mu, logvar, eps)
        x_hat = 2 * model.vae.decode(z) - 1
        terms['code'] = kl_divergence(mu, logvar).cpu().double()

    def predicted_x0(t):
        """What the network makes of y_t ~ q(y_t|x_0)."""
        y_t = q_sample(x_0, alpha_bar[t], torch.randn(x.shape, generator=generator))
        eps = model.eps_theta(y_t.float().to(model.device), t.to(model.device), x_hat, z)
        return predict_x0(y_t, alpha_bar[t], eps.cpu().double()).clamp(-1, 1)

    # The start: y_T is not quite N(0, I).
    start = Normal(alpha_bar[-1] ** 0.5 * x_0, (1 - alpha_bar[-1]) ** 0.5)
    terms['L_T'] = sum_of_pixels(torch.distributions.kl_divergence(start, Normal(0.0, 1.0)))

    terms['L_t'] = nats_of_L_t(x_0, predicted_x0, alpha_bar, generator, variance, strata)

    # The last step has to name a grey level for each pixel.
    mean = predicted_x0(torch.zeros(len(x), dtype=torch.long))
    _, of_posterior = q_posterior(0, 0, alpha_bar[1], alpha_bar[0])  # at t = 2 of formulas
    terms['L_0'] = nats_of_L_0(x_0, mean, of_posterior**0.5)
    return terms


# The samplers and spacings that `evaluate` compares.
EVALUATED = (('ddpm', 'quadratic'), ('ddim', 'quadratic'), ('ddim', 'uniform'))


def evaluation_rows(trained, options):
    """The rows of a model in the table: (name, 'draft' or 'refined', the options that make it)."""
    T = trained.settings.timesteps
    if not options.calls or min(options.calls) < 1 or max(options.calls) > T:
        raise UserError(f'--calls {options.calls}: must be from 1 to {T}')
    if options.guidance and any(calls % 2 for calls in options.calls):
        raise UserError(f'--calls {options.calls}: a guided step takes two')

    form = name_of(trained.settings.form)
    rows = []
    if trained.model.vae is not None:
        of_the_prior = OF_THE_PRIOR
        drafts = f'{form} drafts' + described(options, of_the_prior)
        rows.append((drafts, 'draft', replace(options, steps=1)))  # the shortest chain will do
    else:
        of_the_prior = ('shared_noise',)  # there are no codes, hence no mixture of them
    for sampler, spacing in EVALUATED:
        own = 'variance' if sampler == 'ddpm' else 'eta'
        more = described(options, (own, 'temperature', 'guidance', *of_the_prior))
        for calls in options.calls:
            steps = calls // 2 if options.guidance else calls
            how = replace(options, sampler=sampler, spacing=spacing, steps=steps)
            rows.append((f'{form} {sampler} {spacing}, {calls} calls{more}', 'refined', how))
    return rows


def described(options, names, template=', {} {}'):
    """The options of those names that are not the default, as text: ', eta 0.5, gmm 20'."""
    given = changed(options)
    text = ''
    for name in names:
        if name in given:
            text += template.format(name.replace('_', '-'), as_typed(given[name]))
    return text


def evaluate(options):
    """The command `evaluate`: distances to held-out images, by model, sampler and network calls."""
    runs = [load_trained(options, form) for form in trained_forms(options)]
    if any(comparable(run) != comparable(runs[0]) for run in runs):
        raise UserError(
            f'--out {options.out}: its models are of different --data, --size or --timesteps; '
            'give --form'
        )
    train_images = runs[0].images(train=True)
    held_out = runs[0].images(train=False)
    num = number_to_compare(options, len(train_images), len(held_out))
    real = held_out.batch(range(num))
    if options.bits:
        evaluate_bits(runs, real, options)
        return

    # The table, a row when it is measured; its file is named after what was asked for.
    plan = [(trained, evaluation_rows(trained, options)) for trained in runs]
    if options.gmm is not None and all(trained.model.vae is None for trained in runs):
        raise UserError('--gmm: --form uncond has no codes')
    table = [['images', 'mean', 'lowest', 'highest', 'levels']]
    asked = [name for name in changed(options) if name not in ('out', 'device', 'data', 'root')]
    path = Path(options.out) / f'evaluate{described(options, asked, template="-{}-{}")}.csv'
    print(f'Distance to {num} held-out images (not FID): mean over {options.seeds} seeds, lowest')
    print('and highest; mean of each level of the pyramid, finest first')

    # How far training images are: about as near as one can hope to come.
    parts = [train_images.batch(range(i * num, (i + 1) * num)) for i in range(options.seeds)]
    data = runs[0].settings.data
    distances = [distance(part, real, data) for part in parts]
    floor = add_row(table, path, 'floor: training images', distances)

    means = {}
    for trained, rows in plan:
        mixture = None
        if options.gmm is not None and trained.model.vae is not None:
            mixture = mixture_of_codes(trained, options.gmm)
        for name, which, how in rows:
            distances = []
            for seed in range(options.seed, options.seed + options.seeds):
                how = replace(how, seed=seed)
                draw = partial(sample_chunk, trained.model, how, mixture=mixture)
                images = draw_chunks(draw, num, Progress(after=60))[which]
                distances.append(distance(images, real, data))
            mean = add_row(table, path, name, distances)
            if which == 'refined':
                means[trained.settings.form, how.sampler, how.spacing, how.steps] = mean
    print_conclusion(means, floor)
    print(path)


def number_to_compare(options, n_training, n_held_out):
    """How many images `evaluate` compares: --num, else what there is. UserError if too many."""
    # The floor takes other training images for each seed.
    most = min(n_held_out, n_training // options.seeds)
    num = options.num
    if num is None:
        num = min(200 if options.bits else 500, most)
    if not 2 <= num <= most:
        works = f'--num from 2 to {most}' if most >= 2 else 'too few to compare'
        count = f'there are {n_held_out} held-out and {n_training} training images'
        raise UserError(f'--num {num}, --seeds {options.seeds}: {count}; {works}')
    return num


def print_conclusion(means, floor):
    """Print, for each number of steps, how the best of DiffuseVAE compares to the baseline.

    means: {(form, sampler, spacing, steps): mean distance}; floor: that of training images.
    """
    for steps in sorted({steps for _, _, _, steps in means}):
        of_diffusevae = []
        of_baseline = []
        of_ddim = []  # the baseline's by that sampler: the paper's comparison
        for (form, sampler, _, n), mean in means.items():
            above = max(0, mean - floor)
            if n == steps and form != 'uncond':
                of_diffusevae.append(above)
            elif n == steps:
                of_baseline.append(above)
                if sampler == 'ddim':
                    of_ddim.append(above)
        if of_diffusevae and of_baseline and min(of_baseline) > 0:
            best = min(of_diffusevae)
            print(
                f"With {steps} calls DiffuseVAE's best is {best / min(of_ddim):.2f} times as far "
                "above the floor as the baseline's best DDIM, and "
                f'{best / min(of_baseline):.2f} times as far as its best of all samplers.'
            )


def distance(images, real, data):
    """The `sliced_wasserstein` distance of what is seen of two sets of images."""
    return sliced_wasserstein(without_padding(images, data), without_padding(real, data))


def add_row(table, path, name, distances):
    """Add a row for the distances of several seeds, [levels] each; print it; return their mean."""
    distances = torch.stack(distances)  # [seeds, levels]
    by_seed = distances.mean(dim=1)
    levels = ' '.join(f'{level:.1f}' for level in distances.mean(dim=0))
    row = [f'{value:.1f}' for value in (by_seed.mean(), by_seed.min(), by_seed.max())]
    print(f'{name:36} {row[0]:>7} ({row[1]} to {row[2]}; {levels})', flush=True)
    table.append([f'"{name}"', *row, levels])
    or_warn(write_table, path, table)
    return by_seed.mean().item()


def evaluate_bits(runs, real, options):
    """Print the bound of each model for held-out images, and its terms, in bits per dimension."""
    for trained in runs:
        # Padding is no part of an image. The bound is for image and padding, which together are
        # less likely than the image alone: so it holds for the image.
        dimensions = without_padding(real[:1], trained.settings.data).numel()
        for variance in VARIANCES:
            generator = make_generator(options.seed, 'bits')
            parts = [bound(trained.model, x, generator, variance) for x in real.split(CHUNK)]
            bits = {}
            for term in parts[0]:
                nats = torch.cat([part[term] for part in parts])
                bits[term] = nats / math.log(2) / dimensions
            total = sum(bits.values())
            error = total.std() / len(total) ** 0.5  # the standard error over images
            terms = '  '.join(f'{term} {values.mean():.4f}' for term, values in bits.items())
            name = f'{name_of(trained.settings.form):7} {variance:5}'
            print(
                f'{name}: at most {total.mean():.3f} +- {error:.3f} bits/dim: {terms}', flush=True
            )


# ==== 11. THE COMMAND LINE ========================================================================

COMMANDS = {
    'train': (train, TrainingOptions, 'train a stage: start, resume or extend a run'),
    'sample': (sample, SamplingOptions, 'drafts above refined images, or a folder of PNGs'),
    'reconstruct': (reconstruct, SamplingOptions, 'held-out images, their drafts, and refined'),
    'chain': (chain, SamplingOptions, 'an image noised, and the way back, time by time'),
    'interpolate': (interpolate, SamplingOptions, 'between two codes, and between two noises'),
    'edit': (edit, SamplingOptions, 'move codes along the direction of an attribute'),
    'robust': (robust, SamplingOptions, 'damage a draft more and more before it is refined'),
    'evaluate': (evaluate, SamplingOptions, 'distances to held-out images, or bits per dimension'),
}


def whole_numbers(text):
    """'1,2,2' -> (1, 2, 2)."""
    values = tuple(int(number) for number in text.split(',') if number)
    if any(value < 1 for value in values):
        raise argparse.ArgumentTypeError(f'{text}: takes numbers from 1 on')
    return values


def default_text(setting, options_class):
    """The default of an option in words, for its help."""
    defaults = [setting.default]
    if options_class is TrainingOptions:
        small = PRESETS['small']
        defaults = [(small['both'] | small[stage]).get(setting.name) for stage in (1, 2)]
    defaults = [as_typed(value) for value in defaults if value not in (None, ())]
    if not defaults or setting.type is bool:
        return ''
    if defaults[0] == defaults[-1]:
        return f' (default {defaults[0]})'
    return f' (default {defaults[0]} in stage 1, {defaults[1]} in stage 2)'


def as_typed(value):
    """An option's value as one would type it: (1, 2) is 1,2."""
    return ','.join(map(str, value)) if isinstance(value, tuple) else str(value)


def add_options(parser, command, options_class):
    """Give the parser an option for each field that the command takes."""
    for setting in fields(options_class):
        facts = setting.metadata
        if facts['commands'] is not None and command not in facts['commands']:
            continue
        names = [flag(setting.name)]
        if setting.name == 'out':
            names.append('-o')
        text = facts['meaning'] + default_text(setting, options_class)
        how = {'help': text, 'default': argparse.SUPPRESS}
        if setting.type is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **how)
        else:
            convert = whole_numbers if setting.type is tuple else setting.type
            required = setting.name == 'stage'
            choices = facts['choices']
            parser.add_argument(*names, type=convert, choices=choices, required=required, **how)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are the user's, in one line."""

    def error(self, message):
        raise UserError(message)


def parse(argv):
    """The function of the command, and its options as a dataclass. UserError for bad ones."""
    description = __doc__.split('\n')[0] + ' Presets replace the defaults that train --help shows.'
    parser = Parser(prog='diffusevae.py', description=description)
    commands = parser.add_subparsers(required=True, metavar='COMMAND', dest='command')
    for name, (_, options_class, text) in COMMANDS.items():
        subparser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        add_options(subparser, name, options_class)

    given = vars(parser.parse_args(argv))
    command = given.pop('command')
    run, options_class, _ = COMMANDS[command]
    for setting in fields(options_class):
        value = given.get(setting.name)
        low = setting.metadata['low']
        high = setting.metadata['high']
        if value is not None and low is not None and not low <= value <= high:  # nan is out, too
            limits = f'from {low} on' if high == NO_LIMIT else f'from {low} to {high}'
            raise UserError(f'{flag(setting.name)} {value}: must be {limits}')
    options = options_class(**given)
    if options_class is SamplingOptions:
        check_sampling(command, options)
    return run, options


def main(argv=None):
    """Run one command. Returns the exit code.

    0: success. 1: a training diverged (Python itself exits with 1 after a traceback, a bug).
    2: an error that the user can fix, such as a full disk or a full GPU. 130: interrupted.
    """
    try:
        run, options = parse(argv)
        return run(options) or 0
    except KeyboardInterrupt:
        return 130
    except (
        UserError,
        OSError,
        MemoryError,
        FloatingPointError,
        torch.cuda.OutOfMemoryError,
    ) as error:
        complain('error: ' + ' '.join(str(error).split()))
        return 1 if isinstance(error, FloatingPointError) else 2


if __name__ == '__main__':
    sys.exit(main())
