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
Here z settles what is where, and the diffusion model adds the detail; as the layout is given, it
needs fewer steps.

    python diffusevae.py train --stage 1    # the VAE, into runs/shapes/stage1.pt
    python diffusevae.py train --stage 2    # the diffusion model, on the drafts of that VAE
    python diffusevae.py sample             # drafts above refined images, as a PNG

The built-in images are striped shapes. On two cores of a Xeon with AVX-512 the three commands take
6 min 43 s; refined images then have the crisp stripes that their drafts lack.

    Part 1  The method            1 the VAE, 2 diffusion, 3 the U-Net, 4 the two-stage model
    Part 2  Running it            5 data, 6 settings, 7 training, 8 sampling
    Part 3  The paper's claims    9 what z controls, 10 quality
    Part 4  The command line      11

Part 1 is the method (but for a better prior of z, section 10), and may be read alone; who knows a
U-Net may skip section 3. Of Part 2 one may read `train` first, and go back where a name is new.
Part 3 can be read right after Part 1.
"""

import argparse
import copy
import glob
import hashlib
import io
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps
from torch.distributions import MultivariateNormal
from torchvision import datasets
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor, to_pil_image

# ==== PART 1: THE METHOD ==========================================================================
#
# Tensors go in and tensors come out; files and data sets come later.
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
#   t, T          time, from 1 to T in formulas; an index t in code is one less. At T hardly
#                 anything but noise is left
#   x_t           the image noised to time t
#   beta_t        variance of the noise that is added from time t - 1 to time t
#   alpha_bar_t   (1 - beta_1) ... (1 - beta_t), the share of the image's power left at time t; the
#                 schedule [T] is all of them
#   eps           noise ~ N(0, I); eps_theta is the U-Net's estimate of it
#   x_0_pred      the clean image that an estimate of the noise implies

# ==== 1. THE VAE, which draws the drafts ==========================================================
#
# The decoder turns a code z ~ N(0, I) into a draft: the mean x_hat(z) of a Gaussian p(y|z). The
# encoder says which codes may have made an image: q(z|x_0) = N(mu, diag sigma^2). The method rests
# on one lower bound (NOTES 2.1):
#
#     log p(x_0, y) >= E_q(z|x_0)[ log p(y|z) ] - KL( q(z|x_0) || p(z) )
#         + E_q(z|x_0) E_q(x_1:T|x_0, x_hat)[ log p(x_0:T|x_hat) - log q(x_1:T|x_0, x_hat) ]
#
# (To the model, image and y are two variables, even where y is the image itself: NOTES 2.1.)
#
# Stage 1 trains the VAE on the first line. Stage 2 freezes the VAE and trains the diffusion model
# on the second line, with other weights for its terms (`ddpm_loss`).
#
# Two things are written differently here. The paper's q(z|y, x_0) is q(z|x_0), as y is a function
# of x_0. And the diffusion model, which the paper conditions on y and z, is conditioned on the
# draft x_hat, and on z only if its U-Net is built to see z.


def reparameterize(mu, logvar, eps):
    """Draw z ~ N(mu, sigma^2) such that gradients reach mu and logvar = log sigma^2.

    mu, logvar, eps: [B, z_dim], where eps ~ N(0, I). Returns z: [B, z_dim].
    """
    # z = mu + sigma * eps,  sigma = exp(logvar / 2)
    #
    # The expectation over q(z|x_0) is estimated by one sample. Drawn directly, the sample would not
    # be a function of mu and sigma that one can differentiate. Written like this, all randomness
    # sits in eps, which has no parameters: dz/dmu = 1 and dz/dsigma = eps.
    return mu + torch.exp(logvar / 2) * eps


def kl_divergence(mu, logvar):
    """KL( N(mu, sigma^2) || N(0, I) ) of each example, in nats: [B, z_dim] -> [B]."""
    # KL = E_q[log q(z) - log p(z)] = 1/2 sum_j (mu_j^2 + sigma_j^2 - 1 - log sigma_j^2)
    #
    # The logarithms are quadratic in z. So all that is needed of q is E_q[z^2] = mu^2 + sigma^2 and
    # E_q[(z - mu)^2 / sigma^2] = 1 (NOTES 2.2).
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(dim=1)


def negative_elbo(y, x_hat, mu, logvar, kl_weight=1.0):
    """The loss of stage 1 and its two parts, each a mean over the batch.

    y: what is to be drafted, and x_hat, its draft: [B, C, H, W] in [0, 1]; mu, logvar: [B, z_dim];
    kl_weight >= 0. Returns (loss, squared error, unweighted KL in nats), each of shape [].
    """
    # loss = ||y - x_hat||^2 + kl_weight KL( q(z|x_0) || p(z) )
    #
    # The error is a sum over pixels, the KL a sum over the numbers of z. A decoder N(x_hat,
    # sigma_y^2 I) has -log p(y|z) = ||y - x_hat||^2 / (2 sigma_y^2) + const. Multiply the negative
    # bound, -log p(y|z) + KL, by kl_weight := 2 sigma_y^2: up to a constant it becomes the loss.
    # So the paper's weight of 1 is a decoder with variance 1/2 in each pixel, and a smaller weight
    # is a decoder with a smaller variance. (The authors sum both over the batch. Adam divides
    # gradients by their size, so that its steps are the same.)
    squared_error = (y - x_hat).square().sum(dim=(1, 2, 3)).mean()
    kl = kl_divergence(mu, logvar).mean()
    return squared_error + kl_weight * kl, squared_error, kl


class VAEBlock(nn.Module):
    """A residual bottleneck without normalisation: [B, width, R, R] -> the same shape.

    GELU and a convolution, four times: 1x1 to half the width, twice 3x3 (1x1 where there is a
    single pixel), and 1x1 back. Biases start at zero, as in the authors' code.
    """

    def __init__(self, width, resolution):
        super().__init__()
        half = width // 2
        k = 3 if resolution > 1 else 1  # a single pixel has no neighbours
        self.convs = nn.ModuleList()
        shapes = [(width, half, 1), (half, half, k), (half, half, k), (half, width, 1)]
        for c_in, c_out, kernel in shapes:
            self.convs.append(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2))
            nn.init.zeros_(self.convs[-1].bias)

    def forward(self, h):
        branch = h  # [B, width, R, R]
        for conv in self.convs:
            branch = conv(F.gelu(branch))  # [B, width / 2, R, R], after the last [B, width, R, R]
        return h + branch


def backbone(blocks, widths):
    """Residual blocks, changing resolution in between: most layers of the encoder or the decoder.

    blocks: how many at each resolution, in the order of the layers: {1: 1, 4: 2, ..., 32: 15} goes
    up, {32: 7, 16: 4, ..., 1: 3} goes down. On the way down there is one more block before each
    pooling, as in the authors' code. widths: channels, e.g. {32: 64, ..., 1: 512}.
    """
    layers = []
    for resolution, following in pairwise(blocks):  # each resolution, and the one after it
        layers += [VAEBlock(widths[resolution], resolution) for _ in range(blocks[resolution])]

        # Down: the additional block, then each square of pixels becomes its mean. Up: each pixel
        # becomes a square of equal pixels.
        if following < resolution:
            layers.append(VAEBlock(widths[resolution], resolution))
            layers.append(nn.AvgPool2d(resolution // following))
        else:
            layers.append(nn.Upsample(scale_factor=following // resolution))

        # A 1x1 convolution to the next resolution's width, also where the widths are equal.
        layers.append(nn.Conv2d(widths[resolution], widths[following], 1, bias=False))

    last = list(blocks)[-1]
    layers += [VAEBlock(widths[last], last) for _ in range(blocks[last])]
    return nn.Sequential(*layers)


class VAE(nn.Module):
    """The paper's VAE for images [B, C, size, size] in [0, 1]; `forward` is the loss of stage 1.

    encoder, decoder: blocks by resolution, from `size` down to 1 and back up; widths: channels by
    resolution; z has widths[1] numbers. signal: which y, a name in SIGNALS, below.
    """

    def __init__(self, channels, size, encoder, decoder, widths, kl_weight=1.0, signal='image'):
        super().__init__()
        self.z_dim = widths[1]
        self.kl_weight = kl_weight
        self.signal = SIGNALS[signal]

        # The mean colour of y over the training set is subtracted from what the encoder sees. The
        # buffer is set when training begins. (The authors do without. But where most pixels were
        # white, z came to carry nothing: NOTES 4.)
        self.register_buffer('mean_colour', torch.zeros(channels, 1, 1))

        self.stem = nn.Conv2d(channels, widths[size], 3, padding=1, bias=False)
        self.encoder = backbone(encoder, widths)
        self.mu = nn.Conv2d(self.z_dim, self.z_dim, 1, bias=False)
        self.logvar = nn.Conv2d(self.z_dim, self.z_dim, 1, bias=False)
        self.decoder = backbone(decoder, widths)
        self.head = nn.Conv2d(widths[size], channels, 3, padding=1)

    def encode(self, x):
        """q(z|x_0) of images x [B, C, H, W] in [0, 1]: mu and logvar, each [B, z_dim].

        The encoder sees y alone, what the VAE models of x.
        """
        y = self.signal(x) - self.mean_colour  # [B, C, H, W]
        h = self.encoder(self.stem(y))  # [B, z_dim, 1, 1]
        mu = rearrange(self.mu(h), 'b z 1 1 -> b z')
        logvar = rearrange(self.logvar(h), 'b z 1 1 -> b z')
        return mu, logvar

    def decode(self, z):
        """The draft, the mean of p(y|z): [B, z_dim] -> [B, C, H, W] in [0, 1]."""
        h = self.decoder(rearrange(z, 'b z -> b z 1 1'))  # [B, widths[size], H, W]
        return torch.sigmoid(self.head(h))

    def random_inputs(self, shape, generator):
        """The noise that `forward` needs for images of a shape (B, C, H, W), by name.

        `forward` is given it, so that its result is a function of its arguments alone. Training
        makes a new generator for each step, from the step's number: so it can resume exactly, and
        share a batch among GPUs (section 7).
        """
        return {'eps_z': torch.randn(shape[0], self.z_dim, generator=generator)}

    def forward(self, x, eps_z):
        """The loss and its parts by name, tensors of shape [].

        x: images [B, C, H, W] in [0, 1]; eps_z: [B, z_dim], noise ~ N(0, I).
        """
        mu, logvar = self.encode(x)  # [B, z_dim] each
        z = reparameterize(mu, logvar, eps_z)  # [B, z_dim]
        x_hat = self.decode(z)  # [B, C, H, W]
        loss, squared_error, kl = negative_elbo(self.signal(x), x_hat, mu, logvar, self.kl_weight)
        return {'loss': loss, 'squared_error': squared_error, 'kl': kl}


# What the VAE models of an image, y in [0, 1], is any function of the image x [B, C, H, W]. Usually
# it is y = x (`torch.clone`), as in the authors' code; the others are ours. To apply any of them
# twice is the same as once: so `encode` may be given a y in place of x, such as a grey picture.


def grey(x):
    """y without colours: every channel is replaced by the mean of all."""
    return x.mean(dim=1, keepdim=True).expand_as(x)


def low_resolution(x):
    """y in squares of 4x4 pixels, each of one colour; 4 must divide the size."""
    return F.interpolate(F.avg_pool2d(x, 4), scale_factor=4)


def masked(x):
    """y with the middle of the image, half its height and width, black."""
    border = x.shape[3] // 4
    y = x.clone()
    y[:, :, border:-border, border:-border] = 0
    return y


SIGNALS = {'image': torch.clone, 'grey': grey, 'lowres': low_resolution, 'masked': masked}


# ==== 2. FORWARD AND REVERSE DIFFUSION ============================================================
#
# The forward process adds a little noise in each of T steps:
#
#     q(x_t|x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)
#     hence q(x_t|x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)
#
# The reverse chain starts from pure noise. At each of its times it asks the network for the noise
# in x_t, removes all of it, which leaves an estimate x_0_pred of the clean image, and goes some way
# towards this estimate.
#
# A chain of few steps skips times. So each formula uses alpha_bar at the current time and
# alpha_bar_prev at the earlier, less noisy time to which the chain goes from there. The last step
# goes to the image, where alpha_bar_prev is 1. In `q_sample`, `predict_x0` and `q_posterior` they
# are numbers or, where each image has a time of its own, [B, 1, 1, 1].
#
# All of this is DDPM and DDIM, and knows nothing of drafts, which only the network is shown.


def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    """alpha_bar_t, the share of the image's power that is left at each time: [T], float64."""
    # alpha_bar_t = prod_{s <= t} (1 - beta_s), with beta linear in t
    #
    # The range of beta is made for T = 1000, where 4e-5 of the power is left; with T = 100 a third
    # would be left at the end.
    #
    # In float32 the first 1 - alpha_bar, 1e-4, would have only three digits: enough for the loss,
    # but too few for samplers.
    return torch.cumprod(1 - torch.linspace(beta_1, beta_T, T, dtype=torch.float64), dim=0)


def q_sample(x_0, alpha_bar, eps):
    """Draw x_t ~ q(x_t|x_0): jump from x_0 [B, C, H, W] straight to time t, with eps ~ N(0, I).

    alpha_bar: a float, or one for each image, [B, 1, 1, 1].
    """
    # x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps
    #
    # A single step is x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise. Many of them shrink x_0
    # by the product of the square roots, and a sum of Gaussians is Gaussian again. If the variance
    # of x_{t-1} is 1 - alpha_bar_{t-1}, that of x_t is (1 - beta_t)(1 - alpha_bar_{t-1}) + beta_t,
    # which is 1 - alpha_bar_t (NOTES 2.3).
    return alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * eps


def predict_x0(x_t, alpha_bar, eps):
    """The clean image that makes x_t with the noise eps: `q_sample` solved for x_0.

    x_t, eps: [B, C, H, W]; alpha_bar: as for `q_sample`.
    """
    # x_0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)
    #
    # Errors of eps are multiplied by sqrt(1 - alpha_bar) / sqrt(alpha_bar): by 157 at t = T = 1000.
    return (x_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5


def q_posterior(x_0, x_t, alpha_bar, alpha_bar_prev):
    """Mean and variance of q(x_prev|x_t, x_0): the step back, if the clean image were known.

    x_0, x_t: [B, C, H, W]; alpha_bar, alpha_bar_prev: as for `q_sample`; alpha_bar_prev may be 1.
    """
    # mean     = [ sqrt(alpha_bar_prev) beta / (1 - alpha_bar) ] x_0
    #          + [ sqrt(1 - beta) (1 - alpha_bar_prev) / (1 - alpha_bar) ] x_t
    # variance = beta (1 - alpha_bar_prev) / (1 - alpha_bar),  beta = 1 - alpha_bar / alpha_bar_prev
    #
    # Bayes' rule, with the Gaussians q(x_prev|x_0) and q(x_t|x_prev) (NOTES 2.4). On the full grid
    # of times beta is beta_t; on a coarser one it is the noise added between two of its times.
    beta = 1 - alpha_bar / alpha_bar_prev
    weight_of_x_0 = alpha_bar_prev**0.5 * beta / (1 - alpha_bar)
    weight_of_x_t = (1 - beta) ** 0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)
    mean = weight_of_x_0 * x_0 + weight_of_x_t * x_t
    variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return mean, variance


def ddpm_step(x_t, x_0_pred, alpha_bar, alpha_bar_prev, noise, variance='small'):
    """The ancestral step of DDPM: a draw from the posterior, as if the estimate were the image.

    x_t, x_0_pred, noise: [B, C, H, W], noise ~ N(0, I); alpha_bar, alpha_bar_prev: floats;
    variance: 'small' or 'large'. Returns x_prev.
    """
    # x_prev = mean of q(x_prev|x_t, x_0_pred) + standard deviation * noise; no noise at the end,
    # where alpha_bar_prev is 1 and the small variance 0
    #
    # The "small" variance is the posterior's, the "large" one is the beta of `q_posterior`. Each is
    # right in one of two extremes (NOTES 2.5): the small one if all images were the same, so that
    # x_0 would be known, the large one if they were white noise of variance 1. Our default is
    # small; the authors test CIFAR-10 and CelebA-64 with large.
    mean, step_variance = q_posterior(x_0_pred, x_t, alpha_bar, alpha_bar_prev)
    if variance == 'large' and alpha_bar_prev < 1:
        step_variance = 1 - alpha_bar / alpha_bar_prev
    return mean + step_variance**0.5 * noise


def ddim_step(x_t, x_0_pred, alpha_bar, alpha_bar_prev, noise, eta=0.0):
    """The step of DDIM: deterministic for eta = 0, the ancestral step ("small") for eta = 1.

    x_t, x_0_pred, noise: [B, C, H, W], noise ~ N(0, I); alpha_bar, alpha_bar_prev: floats; eta:
    from 0 to 1. Returns x_prev.
    """
    # x_prev = sqrt(alpha_bar_prev) x_0_pred + sqrt(1 - alpha_bar_prev - sigma^2) eps + sigma noise,
    # sigma  = eta * standard deviation of the posterior,
    # where the variances of the last two terms add up to 1 - alpha_bar_prev
    #
    # If x_0_pred is right and x_t ~ q(x_t|x_0), then eps ~ N(0, I), and x_prev ~ q(x_prev|x_0) for
    # every sigma up to sqrt(1 - alpha_bar_prev) (NOTES 2.5): at each time images are then as noisy
    # as those that the network was trained on, whatever eta is.
    #
    # eps is derived anew from x_t and x_0_pred: where x_0_pred was clipped, it is not the network's
    # any more. (The authors keep the network's; there eta = 1 is then not the ancestral step.)
    eps = (x_t - alpha_bar**0.5 * x_0_pred) / (1 - alpha_bar) ** 0.5
    _, variance = q_posterior(x_0_pred, x_t, alpha_bar, alpha_bar_prev)
    sigma = eta * variance**0.5
    direction = (1 - alpha_bar_prev - sigma**2) ** 0.5 * eps
    return alpha_bar_prev**0.5 * x_0_pred + direction + sigma * noise


# All samplers are called alike: (x_t, x_0_pred, alpha_bar, alpha_bar_prev, noise) -> x_prev; ddim
# has eta = 0, its default.
SAMPLERS = {'ddpm': ddpm_step, 'ddim': ddim_step}
SAMPLERS['ddpm-large'] = partial(ddpm_step, variance='large')


def uniform_times(schedule, steps):
    """`steps` times of a schedule [T] in equal strides, but for rounding, from T - 1 down."""
    return [round(i * len(schedule) / steps) - 1 for i in range(steps, 0, -1)]


def quadratic_times(schedule, steps):
    """`steps` distinct times of a schedule [T], denser towards 0: the paper's for few steps."""
    # index t_i = (i / (steps - 1))^2 t_start
    #
    # The grid is dense near 0, where fine detail is decided. The chain starts at t_start, where the
    # factor of x_0 in x_t, sqrt(alpha_bar), has fallen to 0.039: for the linear schedule with
    # T = 1000 that is 0.8 T, as in the paper and in DDIM. (It starts from N(0, I), although a true
    # x_t would hold 0.039 x_0: a small error, which is accepted.) A single step, and a schedule
    # that never falls so low, start at T - 1, where `uniform_times` always does.
    T = len(schedule)
    if steps == 1:
        return [T - 1]
    t_start = next((t for t in range(T) if schedule[t] ** 0.5 < 0.039), T - 1)

    # Where rounding would merge two times, the next free one is taken; the authors lose it.
    times = [0]
    for i in range(1, steps):
        wanted = round((i / (steps - 1)) ** 2 * t_start)
        times.append(max(wanted, times[-1] + 1))
    return times[::-1]


# The times of a reverse chain, falling, for a schedule [T] and 1 <= steps <= T.
SPACINGS = {'uniform': uniform_times, 'quadratic': quadratic_times}


def ddpm_loss(eps_theta, x_0, alpha_bar, t, eps):
    """The loss of stage 2, a mean over batch, channels and pixels.

    eps_theta: a function of x_t [B, C, H, W] and t [B]; x_0, eps: [B, C, H, W]; alpha_bar: the
    schedule [T]; t: [B], a time for each image. Returns a tensor of shape [].
    """
    # x_t ~ q(x_t|x_0),  loss = mean of (eps - eps_theta(x_t, t))^2
    #
    # By Bayes' rule the second line of the bound (section 1) becomes minus a sum over t of KLs, and
    # two terms for the ends (NOTES 2.7). Each KL compares the posterior q(x_{t-1}|x_t, x_0), the
    # step back if the image were known, with the model's step, which has x_0_pred, here not
    # clipped, in place of the image. Gaussians of fixed variances differ by their means alone, and
    # these means by the error of eps: so each KL is a constant plus w_t (eps - eps_theta)^2, where
    #
    #     w_t = beta_t^2 / (2 variance (1 - beta_t) (1 - alpha_bar_t)):
    #
    # with the small variance, w_t is 0.6 at t = 2, 0.01 at t = 100, then between 0.005 and 0.01.
    #
    # DDPM sets all w_t to 1. The bound gets worse and the images get better: less of the network is
    # spent on small t, where the noise is too faint to be seen.
    alpha_bar_t = rearrange(alpha_bar[t], 'b -> b 1 1 1')
    x_t = q_sample(x_0, alpha_bar_t, eps)  # [B, C, H, W]
    return F.mse_loss(eps_theta(x_t, t), eps)


class Diffusion(nn.Module):
    """The reverse chain for a schedule alpha_bar [T] and any network eps_theta(x_t, t [B])."""

    def __init__(self, alpha_bar):
        super().__init__()
        self.schedule = alpha_bar.tolist()  # for the samplers: Python's floats are float64
        self.register_buffer('alpha_bar', alpha_bar.float(), persistent=False)  # [T], for the loss

    @torch.no_grad()
    def sample(self, eps_theta, x_T, draw_noise, steps, sampler, spacing, passed=None):
        """Run the reverse chain from x_T [B, C, H, W] to x_0 in [-1, 1], by `steps` network calls.

        x_T: N(0, I) noise, taken as x_t at the first time of the grid, which need not be T.
        draw_noise: a function that returns fresh N(0, I) noise for each step, of a shape that
        broadcasts to x_T's: [1, C, H, W] if all images share it.
        sampler, spacing: names in SAMPLERS and SPACINGS.
        passed: None, or a list that collects what the chain passes through: (x_t, x_0_pred) a step.
        """
        times = SPACINGS[spacing](self.schedule, steps)
        alpha_bars = [self.schedule[t] for t in times] + [1.0]  # after the last step: no noise left
        step = SAMPLERS[sampler]

        x_t = x_T  # [B, C, H, W]
        for t, alpha_bar, alpha_bar_prev in zip(times, alpha_bars, alpha_bars[1:]):
            # Ask the network which noise is in x_t ...
            eps = eps_theta(x_t, torch.full((len(x_t),), t, device=x_t.device))

            # ... and which clean image that implies. Pixels lie in [-1, 1]; where t is large and
            # errors of eps are multiplied, the clip keeps the chain on course.
            x_0_pred = predict_x0(x_t, alpha_bar, eps).clamp(-1, 1)
            if passed is not None:
                passed.append((x_t, x_0_pred))

            # Take one step towards it, back to the next time of the grid.
            x_t = step(x_t, x_0_pred, alpha_bar, alpha_bar_prev, draw_noise())
        return x_t


# ==== 3. THE CONDITIONAL U-NET, eps_theta =========================================================
#
# It is given the noisy image and the draft, stacked as channels, and the time, and returns the
# noise. On the way down residual blocks alternate with halvings of the resolution: at fewer pixels
# a convolution of 3x3 reaches further, and attention, which compares every pixel with all others,
# is cheap. On the way up the resolution doubles again. As halving loses the exact places of things,
# every feature map of the way down is stored as a skip, and handed to its partner on the way up.


def time_embedding(t, width):
    """Times as sinusoids, float32 on t's device: t [B] -> [B, width], first cosines, then sines."""
    # cos(w_i t) and sin(w_i t),  w_i = exp(-ln(10^4) i / (width / 2)),  i = 0 ... width / 2 - 1
    #
    # A single number t would be a poor input. Of these waves the fast ones tell neighbouring times
    # apart, the slow ones early from late.
    i = torch.arange(width // 2, device=t.device)
    frequencies = torch.exp(-math.log(1e4) / (width // 2) * i)
    angles = t[:, None] * frequencies  # [B, width / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def embedding_mlp(width, dim):
    """Two linear layers that turn the time embedding, or z, into what residual blocks are told."""
    return nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))


def zero_init(conv):
    """The same convolution with all its parameters set to zero."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


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
        qkv = self.qkv(self.norm(h))  # [B, 3 C, H, W]
        split = 'b (three heads d) y x -> three b heads (y x) d'
        query, key, value = rearrange(qkv, split, three=3, heads=self.heads)  # [B, heads, H W, d]

        # softmax(query key^T / sqrt(d)) value: a mean of the values of all pixels, weighted by how
        # well their keys fit the query. sqrt(d) keeps the softmax from saturating as d grows.
        mixed = F.scaled_dot_product_attention(query, key, value)  # [B, heads, H W, d]

        mixed = rearrange(mixed, 'b heads (y x) d -> b (heads d) y x', y=h.shape[2])
        return h + self.out(mixed)


class ResBlock(nn.Module):
    """A residual block that is told the time: [B, in_channels, H, W] -> [B, out_channels, H, W].

    heads: of the attention that follows, 0 for none; embed_dim: width of the embedding of t
    (and z). With scale_shift the embedding scales and shifts the features, which the authors use in
    networks that see z; without, it is added to them. groups: of GroupNorm.
    """

    def __init__(self, in_channels, out_channels, heads, embed_dim, scale_shift, groups, dropout):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.project = nn.Linear(embed_dim, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity()  # what the branch is added to
        if in_channels != out_channels:
            self.skip = nn.Conv2d(in_channels, out_channels, 1)
        self.attention = Attention(out_channels, heads, groups) if heads else nn.Identity()

    def forward(self, h, embedding):
        # First half of the branch: normalise, apply the nonlinearity, mix neighbouring pixels.
        branch = self.conv1(F.silu(self.norm1(h)))  # [B, out_channels, H, W]

        # Tell every pixel the time, and z, if the network was built for it: one number a channel,
        # added before the norm, or two, a scale and a shift after it.
        embedding = self.project(F.silu(embedding))  # [B, out_channels], or twice as many
        embedding = rearrange(embedding, 'b c -> b c 1 1')
        if self.scale_shift:
            scale, shift = embedding.chunk(2, dim=1)  # [B, out_channels, 1, 1] each
            branch = self.norm2(branch) * (1 + scale) + shift
        else:
            branch = self.norm2(branch + embedding)

        # Second half. `conv2` starts at zero: an untrained block passes its input through (but for
        # a change of width), so that in a deep stack of them no signal and no gradient explodes.
        branch = self.conv2(self.dropout(F.silu(branch)))  # [B, out_channels, H, W]
        return self.attention(self.skip(h) + branch)


class UNet(nn.Module):
    """eps_theta: images x_in [B, in_channels, size, size], t [B], z [B, z_dim] -> the noise.

    channels: the width of the stem; multipliers: each level's width as a multiple of it, e.g.
    (1, 2, 2, 2); blocks: how many a level has on the way down; attention: the resolutions, in
    pixels, that attend besides the bottleneck; z_dim: 0 if the network is not to see z.
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
    ):
        super().__init__()
        self.channels = channels
        self.bfloat16 = False  # whether convolutions and the like use it (section 7 decides)

        # GroupNorm subtracts from each group of channels their mean over all pixels. Where groups
        # have few channels, the mean colour of the image is lost with it: small networks then draw
        # in colours that drift (NOTES 4). So they have one group, and large ones the paper's 32.
        groups = 32 if channels >= 128 else 1

        # What all blocks have in common. Each has its own widths, and its heads if it attends.
        embed_dim = 4 * channels
        common = dict(embed_dim=embed_dim, scale_shift=z_dim > 0, groups=groups, dropout=dropout)
        new_block = partial(ResBlock, **common)

        self.time_mlp = embedding_mlp(channels, embed_dim)
        self.z_mlp = embedding_mlp(z_dim, embed_dim) if z_dim else None
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()

        # The way down: `blocks` blocks a level, with attention if its resolution asks for it, and a
        # halving between two levels. The output of the stem, of each block and of each halving is
        # stored; `skips` has their widths.
        width = channels
        skips = [width]
        for level, multiplier in enumerate(multipliers):
            own_heads = heads if size // 2**level in attention else 0
            for _ in range(blocks):
                self.down.append(new_block(width, multiplier * channels, own_heads))
                width = multiplier * channels
                skips.append(width)
            if level < len(multipliers) - 1:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)

        # The bottleneck always attends: it has the fewest pixels to compare.
        self.bottleneck = nn.ModuleList(
            [new_block(width, width, heads), new_block(width, width, 0)]
        )

        # The way up: the levels in reverse, with a block for each stored map of a level: for what
        # came into it, and for the output of each of its blocks. Doubling repeats the pixels, and a
        # convolution smooths them.
        for level, multiplier in reversed(list(enumerate(multipliers))):
            own_heads = heads if size // 2**level in attention else 0
            for _ in range(blocks + 1):
                self.up.append(new_block(width + skips.pop(), multiplier * channels, own_heads))
                width = multiplier * channels
            if level > 0:
                smooth = nn.Conv2d(width, width, 3, padding=1)
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), smooth))

        # The last layer starts at zero: a network that knows nothing yet predicts no noise, instead
        # of an arbitrary pattern that it would first have to unlearn.
        self.head_norm = nn.GroupNorm(groups, width)
        self.head = zero_init(nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x_in, t, z=None):
        # Where the device is fast at bfloat16, autocast computes the products in it. (Even one that
        # is disabled refuses devices that it does not know, such as `meta`; 'cpu' it knows.)
        device_type = x_in.device.type if self.bfloat16 else 'cpu'
        with torch.autocast(device_type, torch.bfloat16, enabled=self.bfloat16):
            embedding = self.time_mlp(time_embedding(t, self.channels))  # [B, 4 channels]
            if self.z_mlp is not None:
                embedding = embedding + self.z_mlp(z)

            # The way down.
            h = self.stem(x_in)  # [B, channels, size, size]
            skips = [h]
            for layer in self.down:
                h = layer(h, embedding) if isinstance(layer, ResBlock) else layer(h)
                skips.append(h)

            for layer in self.bottleneck:
                h = layer(h, embedding)  # [B, last width, lowest resolution, the same]

            # The way up: every block is given the newest map not yet used, beside h as channels.
            for layer in self.up:
                if isinstance(layer, ResBlock):
                    h = layer(torch.cat([h, skips.pop()], dim=1), embedding)
                else:
                    h = layer(h)  # twice the resolution

        # The last layers compute in float32, which costs little: so eps is not rounded to the 8
        # significant bits of bfloat16, an error that x_0_pred would multiply by 157 at T (NOTES 4).
        # What the layers before have rounded remains.
        return self.head(F.silu(self.head_norm(h.float())))  # [B, out_channels, size, size]


# ==== 4. THE TWO-STAGE MODEL: a diffusion model conditioned on the drafts of the frozen VAE =======
#
# Here the parts meet. In training, the VAE encodes an image, draws a code and decodes it to a
# draft; the U-Net learns to find the noise in that image beside its draft. In sampling, the code
# comes from the prior. The baseline, with which the paper compares, is the same diffusion model
# without VAE and draft.
#
# In the paper's Formulation 1 the forward process ignores the draft, as in section 2. In
# Formulation 2 it carries the draft along, so that at T the draft plus noise is left. With x'_t for
# what the paper calls x_t there,
#
#   q(x'_1|x_0, x_hat)      = N(sqrt(1 - beta_1) x_0 + x_hat, beta_1 I)
#   and for t > 1
#   q(x'_t|x'_{t-1}, x_hat) = N(sqrt(1 - beta_t) x'_{t-1} + (1 - sqrt(1 - beta_t)) x_hat, beta_t I)
#   hence q(x'_t|x_0, x_hat) = N(sqrt(alpha_bar_t) x_0 + x_hat, (1 - alpha_bar_t) I) for t >= 1
#
# Let x_t := x'_t - x_hat for t >= 1, and leave x_0 as it is. Subtract x_hat from both means: the
# first becomes sqrt(1 - beta_1) x_0, the second sqrt(1 - beta_t) (x'_{t-1} - x_hat), which is
# sqrt(1 - beta_t) x_{t-1}. So x_t follows the process of section 2 (NOTES 2.6), and one
# implementation, in x_t, serves both formulations. The draft is added in one place only, where the
# network sees it. And a chain ends in x_0, the image itself, not in a difference to the draft.


def network_input(x_t, x_hat, form):
    """What the U-Net sees of x_t and the draft x_hat, in form '1' or '2': [B, 2C, H, W].

    x_t, x_hat: [B, C, H, W], x_hat in [-1, 1].
    """
    # Formulation 1: [x_t, x_hat] on the channel axis. Formulation 2: [x_t + x_hat, x_hat].
    #
    # This is all that tells the formulations apart. The first convolution is linear, and
    # W_1 (x_t + x_hat) + W_2 x_hat = W_1 x_t + (W_1 + W_2) x_hat: so both can represent the same
    # functions, and differ in where training starts and how it proceeds.
    if form == '2':
        x_t = x_t + x_hat
    return torch.cat([x_t, x_hat], dim=1)


class DiffuseVAE(nn.Module):
    """The frozen VAE and the diffusion model on its drafts; `forward` is the loss of stage 2.

    vae: of stage 1, or None for the baseline; unet: with 2C input channels, or C for the baseline;
    form: formulation '1' or '2', of no effect for the baseline; cond_drop: share of the training
    images whose condition is withheld, for guidance.
    """

    def __init__(self, vae, unet, diffusion, form, cond_drop=0.0):
        super().__init__()
        self.vae = vae
        self.unet = unet
        self.diffusion = diffusion
        self.form = form
        self.cond_drop = cond_drop
        self.z_dim = 0  # of the VAE's codes, whether the U-Net is shown them or not
        if vae is not None:
            self.z_dim = vae.z_dim
            vae.requires_grad_(False)

    def condition(self, draft, z):
        """All that the U-Net is told besides x_t and t: {name: tensor [B, ...]}.

        draft: [B, C, H, W] in [0, 1]; z: [B, z_dim], which only a U-Net with z_dim looks at. Both
        are ignored by the baseline, which has no condition.
        """
        if self.vae is None:
            return {}
        return {'x_hat': 2 * draft - 1, 'z': z}  # from the VAE's [0, 1] to [-1, 1]

    def eps_theta(self, x_t, t, x_hat=None, **told):
        """The U-Net's estimate of the noise in x_t [B, C, H, W] at times t [B], given a condition.

        x_hat: that of `condition`; told: all else in it, which is z. The baseline has neither.
        """
        x_in = x_t if x_hat is None else network_input(x_t, x_hat, self.form)  # [B, C or 2C, H, W]
        return self.unet(x_in, t, **told)

    def random_inputs(self, shape, generator):
        """Times and noise that `forward` needs for images of a shape (B, C, H, W), by name."""
        # Times are uniform on 0 ... T - 1. DDPM draws them independently. Here the i-th of B images
        # has its time from the i-th of B equal parts of [0, T): so batches are alike, each with
        # small and large times, which differ most in their loss. (Which image is the i-th is
        # random, so that all meet all times. The clamp is against rounding to T.)
        B = shape[0]
        T = len(self.diffusion.schedule)
        t = (torch.arange(B) + torch.rand(B, generator=generator)) * T / B
        return {
            't': t.long().clamp(max=T - 1),
            'eps_z': torch.randn(B, self.z_dim, generator=generator),
            'eps': torch.randn(shape, generator=generator),
            'keep': (torch.rand(B, generator=generator) >= self.cond_drop).float(),
        }

    def forward(self, x, t, eps_z, eps, keep):
        """The loss for images x [B, C, H, W] in [0, 1], by name.

        t: [B], times; eps_z: [B, z_dim] and eps: [B, C, H, W], noise of the code and of the image;
        keep: [B], 0 where the condition is withheld, else 1.
        """
        condition = {}
        if self.vae is not None:
            # Encode and draft. The bound has an expectation over q(z|x_0), so z is a sample, not
            # the mean, and another one each time that the image comes up. The VAE is frozen: no
            # gradients. (It has no dropout and no batch statistics, so its mode does not matter.)
            with torch.no_grad():
                mu, logvar = self.vae.encode(x)  # [B, z_dim] each
                z = reparameterize(mu, logvar, eps_z)  # [B, z_dim]
                condition = self.condition(self.vae.decode(z), z)

            # Withhold the condition of some images, if asked to: for guidance the network must also
            # know the answer without it. In its place come zeros: a grey image, and the mean of the
            # prior. (The authors withhold it from whole batches.)
            for name, value in condition.items():
                condition[name] = torch.einsum('b,b...->b...', keep, value)  # keep[i] value[i]

        # Add noise to the image x itself, not to y (of a grey y the colours are still to be learnt
        # here), and predict the noise.
        x_0 = 2 * x - 1  # [B, C, H, W] in [-1, 1]
        eps_theta = partial(self.eps_theta, **condition)
        return {'loss': ddpm_loss(eps_theta, x_0, self.diffusion.alpha_bar, t, eps)}

    @torch.no_grad()
    def generate(self, z, x_T, draw_noise, draft=None, guidance=0.0, **chain):
        """Sampling: returns {'draft': ..., 'refined': ...}, the baseline 'refined' alone.

        z: [B, z_dim], from the prior N(0, I) for new images;
        x_T: [B, C, H, W], noise ~ N(0, I), in Formulation 2 as well;
        draft: to be refined in place of the decoder's. If the U-Net sees z, z has to be the code of
        this draft; else z is ignored;
        guidance: the weight w >= 0, for models with cond_drop; above 0 a step makes two calls.
        `draw_noise` and the other keywords, such as steps=50, are those of `Diffusion.sample`.
        Drafts and images are [B, C, H, W] in [0, 1]. To be called in eval mode, without dropout.
        """
        # Stage 1 drafts.
        if self.vae is not None and draft is None:
            draft = self.vae.decode(z)  # [B, C, H, W] in [0, 1]
        condition = self.condition(draft, z)
        nothing = {name: torch.zeros_like(value) for name, value in condition.items()}

        # Stage 2 refines, by a reverse chain that is told the condition at each step.
        def guided(x_t, t):
            eps = self.eps_theta(x_t, t, **condition)
            if guidance == 0:
                return eps

            # Classifier-free guidance: (1 + w) eps(condition) - w eps(nothing) exaggerates what the
            # condition changes in the answer. For "nothing" x_hat is 0: in Formulation 2, too, the
            # network then sees x_t itself, as in training. (The authors still add x_hat to it.)
            eps_null = self.eps_theta(x_t, t, **nothing)
            return (1 + guidance) * eps - guidance * eps_null

        x_0 = self.diffusion.sample(guided, x_T, draw_noise, **chain)
        images = {} if self.vae is None else {'draft': draft}
        return images | {'refined': (x_0 + 1) / 2}


# ==== PART 2: RUNNING IT ==========================================================================
# What a run needs besides the method: images, settings, a loop that trains, and sampling.


class UserError(Exception):
    """An error that the user can fix: `main` prints it in one line.

    An error of another kind is a bug, and keeps its traceback.
    """


# ==== 5. DATA, and what is printed and written ====================================================
# A set of images is a tensor of bytes in memory: even CelebA-HQ at 256x256 is only 5.9 GB. Batches
# are in [0, 1], for the VAE; section 4 maps them to [-1, 1] for the diffusion model. Held-out
# images never enter training: they are a test split, 5% of a folder, or shapes drawn with another
# seed. Every loader returns its images in a fixed random order: the first n are a fair sample of
# the set, and a command that needs a few pictures reads only a few files.
#
# The built-in shapes need no download. A VAE learns their outline, place, size and colours in
# minutes and blurs their stripes, which the diffusion model restores: so a laptop shows what the
# method does.


def seed_of(*key):
    """A seed that depends on all parts of a key, e.g. (0, 'step', 17), and on nothing else."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], 'little') >> 1  # 63 bits fit into a signed integer of 64


def make_generator(*key):
    """A random generator with the `seed_of` a key, on the CPU, so that all devices get the same."""
    return torch.Generator().manual_seed(seed_of(*key))


# The number of this process, and how many there are, as torchrun says. (With a RANK that another
# program left in the environment a lone process would take itself for a second, and save nothing.)
TORCHRUN = 'TORCHELASTIC_RUN_ID' in os.environ
RANK = int(os.environ['RANK']) if TORCHRUN else 0
WORLD = int(os.environ['WORLD_SIZE']) if TORCHRUN else 1


class Progress:
    """A line of progress: rewritten in place on a terminal, elsewhere one every ten seconds."""

    due = 0.0  # the earliest time of the next line

    def show(self, text, end=False):
        """Print the line, or drop it if the last one is too recent and this is not the end."""
        now = time.monotonic()
        if RANK > 0 or (now < self.due and not end):
            return
        terminal = sys.stdout.isatty()
        self.due = now + (0.1 if terminal else 10)
        if terminal:  # a line that is longer than the terminal is wide could not be rewritten
            text = f'\r{text[: os.get_terminal_size().columns - 1]}\x1b[K'
        print(text, end='' if terminal and not end else '\n', flush=True)


PROGRESS = Progress()


def complain(text):
    """Print a warning or an error on a line of its own, in place of the line of progress."""
    start = '\r\x1b[K' if sys.stderr.isatty() else ''
    print(start + ' '.join(text.split()), file=sys.stderr, flush=True)


@dataclass
class Images:
    """A set of images in memory: uint8 pixels [N, C, H, W], and attributes {name: bool [N]}."""

    pixels: torch.Tensor
    attributes: dict

    def batch(self, indices):
        """Images by their indices, or a slice: floats in [0, 1], [B, C, H, W]."""
        return self.pixels[indices].float() / 255


KINDS = ('wide', 'circle', 'tall')  # a wide bar, a circle and a tall bar


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
    # Eight uniform numbers decide an image. Their ranges suit a Gaussian code: hues, for example,
    # go from red to blue, since a whole circle of them would not fit into it (NOTES 4).
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


# The loaders are all called alike: with the name or the folder, the folder of downloads, height and
# width, whether the training or the held-out images are wanted, and how many (None: all). Each uses
# what it needs, and returns `Images`. A set that has only one size says so.


def load_shapes(data, root, size, train, num):
    """20,000 shapes to train on, 2,000 held out, all drawn at once."""
    # As floats, of which there are several copies, larger ones may not fit into the memory.
    if size > 64:
        raise UserError(f'--size {size}: --data shapes has up to 64 pixels a side')
    n = 20_000 if train else 2_000
    pixels, factors = draw_shapes(n, make_generator('shapes', train), size)

    # Attributes: of each kind, or above the middle of a factor's range.
    attributes = {name: factors['kind'] == kind for kind, name in enumerate(KINDS)}
    attributes |= {name: factors[name] > 0.5 for name in factors if name != 'kind'}
    return Images(pixels[:num], {name: has[:num] for name, has in attributes.items()})


def download(dataset, data, root, **split):
    """A set of torchvision, from the folder `root` or else from the network."""
    try:
        return dataset(root, download=True, **split)
    except Exception as error:  # those of gdown are of many kinds
        raise UserError(f'--data {data}, in --root {root}: {error}') from error


def load_small_images(data, root, size, train, num):
    """MNIST's digits, Fashion-MNIST's clothes or CIFAR-10's photographs: 32x32 pixels."""
    if size != 32:
        raise UserError(f'--size {size}: the images of --data {data} have 32 pixels a side')
    sets = {'mnist': datasets.MNIST, 'fashion': datasets.FashionMNIST, 'cifar10': datasets.CIFAR10}
    found = download(sets[data], data, root, train=train)

    # MNIST is in the order of its collection: its first digits differ from the rest.
    order = torch.randperm(len(found.data), generator=make_generator('order'))[:num]
    pixels = torch.as_tensor(found.data)[order]
    if data == 'cifar10':
        pixels = rearrange(pixels, 'n y x c -> n c y x')
    else:
        pixels = F.pad(pixels[:, None], (2, 2, 2, 2))  # 28x28 become [n, 1, 32, 32]

    # An attribute for each class, by torchvision's name of it, such as '3 - three' or 'truck'.
    targets = torch.as_tensor(found.targets)[order]
    return Images(pixels, {name: targets == i for i, name in enumerate(found.classes)})


def read_picture(path, size, crop):
    """The picture in a file: uint8 [3, size, size]. Raises nearly anything if it is broken.

    With `crop` it is the central square, else all of it, squeezed; small pictures are enlarged.
    """
    with Image.open(path) as picture:  # of a file with several pictures, the first
        picture.draft(None, (3 * size, 3 * size))  # JPEGs: decode no more than is needed
        picture = ImageOps.exif_transpose(picture)  # as the photographer held the camera

    # Pillow's own conversion to 8 bits would clip. White is 65535, as the formats define it, and
    # not a picture's own maximum: so the pictures of a folder can be compared.
    if picture.mode == 'F':
        raise ValueError('its pixels are floats, of which nothing says what is white')
    if picture.mode.startswith('I'):
        picture = picture.convert('I').point(lambda value: value / 257 + 0.5).convert('L')

    # Transparent pixels have colours that nobody was meant to see: they become white.
    if picture.mode in ('LA', 'PA', 'RGBA') or 'transparency' in picture.info:
        picture = picture.convert('RGBA')
        picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture)

    picture = picture.convert('RGB')
    square = (size, size)
    picture = ImageOps.fit(picture, square, Image.LANCZOS) if crop else picture.resize(square)
    return pil_to_tensor(picture)


def read_pictures(paths, size, crop):
    """The pictures that can be read: uint8 [N, C, size, size], and the indices of their paths.

    C is 1 if all are grey, else 3. What cannot be read is counted in one line and left out.
    """
    # Linux promises more memory than there is, and kills the process that uses it: so ask before.
    if hasattr(os, 'sysconf'):
        memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
        room = memory * 4 // 5 // (3 * size**2) // WORLD
        if len(paths) > room:
            raise UserError(f'--data: of {len(paths)} pictures {room} fit into the memory')
    pixels = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    errors = {}

    def read(i):
        try:
            pixels[i] = read_picture(paths[i], size, crop)
        except Exception as error:  # on a broken file Pillow's decoders raise nearly anything
            errors[i] = f'{paths[i]}: {error}'  # as text: the error itself holds the picture

    # Threads, since Pillow decodes outside of Python's lock. On Ctrl-C `map` drops what waits.
    PROGRESS.due = time.monotonic() + 3  # no line for a small folder
    with ThreadPoolExecutor() as pool:
        for i, _ in enumerate(pool.map(read, range(len(paths)))):
            PROGRESS.show(f'reading pictures: {i + 1} of {len(paths)}')

    good = [i for i in range(len(paths)) if i not in errors]
    if errors:
        message = f'{len(errors)} of {len(paths)} pictures cannot be read, for example '
        message += errors[min(errors)]
        if not good:
            raise UserError(f'--data: {message}')
        complain(f'warning: {message}; they are left out')
        pixels = pixels[good]
    if torch.equal(pixels[:, 1:], pixels[:, :2]):  # three equal channels
        pixels = pixels[:, :1].contiguous()
    return pixels, good


def load_celeba(data, root, size, train, num):
    """162,770 faces to train on, 19,962 held out, with 40 attributes such as Smiling.

    As the authors do, the 178x218 pixels are squeezed to a square without a crop. To download the
    set torchvision needs the package gdown.
    """
    found = download(datasets.CelebA, data, root, split='train' if train else 'test')
    order = torch.randperm(len(found.filename), generator=make_generator('order'))[:num]
    paths = [f'{found.root}/celeba/img_align_celeba/{found.filename[i]}' for i in order]
    pixels, good = read_pictures(paths, size, crop=False)
    return Images(pixels, dict(zip(found.attr_names, found.attr[order][good].bool().T)))


def load_folder(data, root, size, train, num):
    """Training or held-out pictures of the folder `data`, ordered by a hash of their names."""
    # Hidden files are passed over, and links are followed. Two links may lead to one file: each
    # file counts once, so that no picture is both trained on and held out.
    names = sorted(glob.glob('**/*.*', root_dir=data, recursive=True))
    one_name = {os.path.realpath(f'{data}/{name}'): name for name in names}

    # A picture has the suffix of a format that Pillow knows.
    suffixes = Image.registered_extensions()
    pictures = [name for name in one_name.values() if Path(name).suffix.lower() in suffixes]
    if len(pictures) < 2:
        raise UserError(f'--data {data}: not {", ".join(DATA_SETS)}, nor a folder of 2 pictures')

    # Held out are the pictures whose hash is in the lowest 5% of its range. So they stay held out
    # when files are added (except in a very small folder, which holds out one all the same). To
    # sort by the hash also shuffles.
    pictures.sort(key=seed_of)
    held_out = sum(seed_of(name) < 0.05 * 2**63 for name in pictures)
    held_out = min(max(1, held_out), len(pictures) - 1)
    chosen = pictures[held_out:] if train else pictures[:held_out]
    pixels, _ = read_pictures([f'{data}/{name}' for name in chosen[:num]], size, crop=True)
    return Images(pixels, {})


DATA_SETS = {'shapes': load_shapes, 'celeba': load_celeba}
DATA_SETS |= dict.fromkeys(['mnist', 'fashion', 'cifar10'], load_small_images)


def load_images(settings, train, num=None, channels=None):
    """The training or the held-out images of a run: all, or num in random order.

    channels: of the model that they are for; None for as many as they have.
    """
    loader = DATA_SETS.get(settings.data, load_folder)
    found = loader(settings.data, settings.root, settings.size, train, num)

    # A set's own number of channels may differ from the model's: a few pictures of a set in colour
    # may all be grey, or held-out ones in colour where those for training are grey.
    if channels not in (None, found.pixels.shape[1]):
        found.pixels = grey(found.pixels.float())[:, :1].round().byte().expand(-1, channels, -1, -1)
    return found


def to_uint8(images):
    """Pixels for a file: [N, C, H, W] in [0, 1] -> uint8 on the CPU."""
    # Rounded. The authors truncate, which darkens all images by half a grey level.
    return (255 * images).round().clamp(0, 255).byte().cpu()


def write_grid(path, rows, columns=()):
    """Write rows, a list of (label, images [n, C, H, W] in [0, 1]), as one PNG.

    Labels stand in the left margin, `columns` above the images.
    """
    # Small images are enlarged; each has a margin of one of its pixels.
    width = rows[0][1].shape[3]
    scale = max(1, 64 // width)
    cell = scale * (width + 1)  # from one image to the next
    left, top = 64, 16  # for the labels
    n = max(len(images) for _, images in rows)
    sheet = Image.new('RGB', (left + n * cell, top + len(rows) * cell), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(columns):
        draw.text((left + (i + 0.5) * cell, 2), label, 'black', anchor='mt')

    for i, (label, images) in enumerate(rows):
        draw.text((4, top + (i + 0.5) * cell), label, 'black', anchor='lm')
        for j, pixels in enumerate(to_uint8(images)):
            picture = ImageOps.scale(to_pil_image(pixels), scale, Image.NEAREST)
            sheet.paste(picture, (left + j * cell, top + i * cell))
    write_atomically(path, partial(sheet.save, format='png'))


def write_atomically(path, write):
    """Call write(file) such that `path` becomes the whole new file, or stays the old one."""
    # Written in memory, then beside the file, then renamed: a name never stands for half a file,
    # and a full disk is an OSError, which `main` reports. A run that is killed in between leaves
    # one .part, which the next writing replaces.
    content = io.BytesIO()
    write(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + '.part')
    try:
        part.write_bytes(content.getbuffer())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ==== 6. SETTINGS =================================================================================
# One dataclass for training, one for all that generates images. A field is an option of the command
# line, its sentence the help. Each command offers the options that its defaults name, and argparse
# itself refuses all others. What is not typed for a training run comes from its checkpoint or from
# a preset. `small` is ours and trains in minutes; the others have the paper's numbers.

# The forms of stage 2, Formulations 1 and 2 and the baseline without drafts: their names in files.
FORMS = {'1': 'form1', '2': 'form2', 'uncond': 'uncond'}


def flag(name):
    """The option of a field, as it is typed: z_dim -> --z-dim."""
    return '--' + name.replace('_', '-')


# A preset has the settings of stage 1 and of stage 2, and so says which options each has. What both
# stages share is the default of its field, below, unless a preset has another. (The fields in BOTH
# have no such default, since the other commands use them, too, with defaults of their own.)
#
# Our own preset, for minutes on a CPU. Small networks bear a much larger learning rate than the
# paper's, if it falls to 0 from the end of a short warm-up on (NOTES 4).
BOTH = dict(data='shapes', root='data', out=None, device=None)

# By `negative_elbo` a weight of 0.2 is a decoder with variance 0.1, still an exact bound. The clip
# only catches explosions, which the VAE's lack of normalisation allows (NOTES 4).
STAGE_1 = dict(z_dim=8, kl_weight=0.2, signal='image', batch=32, steps=2400, lr=4e-3, clip=100.0)

# Two levels only: so the bottleneck, which attends, has 16x16 pixels, enough to see stripes.
STAGE_2 = dict(form='1', channels=16, multipliers=(1, 2), blocks=1, attention=(), heads=1)
STAGE_2 |= dict(dropout=0.0, z_cond=False, cond_drop=0.0, batch=16, steps=3600, lr=1.5e-2, clip=1.0)
SMALL = {1: BOTH | STAGE_1, 2: BOTH | STAGE_2}


def paper(data, size, vae, ddpm, multipliers, attention, dropout=0.1):
    """A preset with the paper's numbers, for stages 1 and 2.

    vae, ddpm: (epochs, batch) of the stages. Where the authors' scripts and their YAML files
    differ, in batch, epochs, heads and dropout, the scripts count.
    """
    # A checkpoint may take 2 GB, and its picture 50 network calls or more: save less often. `train`
    # turns epochs into steps, when it knows the number of images.
    both = dict(data=data, size=size, save_every=600.0, steps=None, cooldown=0.0)
    large = size > 64
    stage_1 = dict(kl_weight=1.0, z_dim=1024 if large else 512, flip=large)
    stage_1 |= dict(epochs=vae[0], batch=vae[1], lr=1e-4, warmup=1, clip=math.inf, ema=0.0)
    stage_2 = dict(channels=128, multipliers=multipliers, blocks=2, attention=attention)
    stage_2 |= dict(epochs=ddpm[0], batch=ddpm[1], lr=2e-5 if large else 2e-4, warmup=5000)
    stage_2 |= dict(heads=8, dropout=dropout, flip=True)
    return {1: SMALL[1] | both | stage_1, 2: SMALL[2] | both | stage_2}


PRESETS = {  # celebahq needs --data, a folder of its images
    'small': SMALL,
    'cifar10': paper('cifar10', 32, (500, 128), (2850, 256), (1, 2, 2, 2), (16,), 0.3),
    'celeba64': paper('celeba', 64, (245, 128), (500, 128), (1, 2, 2, 2, 4), (4,)),
    'celebahq128': paper('celebahq', 128, (500, 126), (1000, 64), (1, 2, 2, 3, 4), (8,)),
    'celebahq256': paper('celebahq', 256, (500, 16), (1000, 64), (1, 1, 2, 2, 4, 4), (16,)),
}


def paper_vae(encoder, decoder, widths):
    """One of the paper's VAEs: (encoder, decoder, widths), each {resolution: number}.

    encoder: blocks from the image down to one pixel; decoder: blocks from there up; widths: from
    4x4 pixels up (those of a single pixel are z_dim).
    """
    up = (1, 4, 8, 16, 32, 64, 128, 256)[: len(decoder)]
    return dict(zip(up[::-1], encoder)), dict(zip(up, decoder)), dict(zip(up[1:], widths))


PAPER_VAES = {
    'cifar10': paper_vae((7, 4, 4, 3, 3), (1, 2, 3, 7, 15), (256, 256, 128, 64)),
    'celeba64': paper_vae((7, 4, 7, 3, 3, 2), (1, 2, 3, 7, 8, 10), (256, 256, 256, 128, 64)),
    'celebahq128': paper_vae(
        (1, 3, 3, 7, 3, 3, 2), (1, 2, 2, 6, 2, 2, 1), (512, 256, 128, 128, 64, 64)
    ),
    'celebahq256': paper_vae(
        (3, 3, 5, 7, 9, 7, 5, 2), (2, 4, 6, 8, 5, 4, 2, 2), (512, 256, 128, 128, 64, 64, 64)
    ),
}


def vae_layout(settings):
    """Blocks of encoder and decoder, and channels, by resolution: what `VAE` is built of."""
    if settings.preset in PAPER_VAES:
        encoder, decoder, widths = PAPER_VAES[settings.preset]
        return encoder, decoder, widths | {1: settings.z_dim}

    # The small VAE does little where there are many pixels: its encoder pools to 8x8 at once. (With
    # --size 16 the keys 16 and `size` are one, and the later entry counts.)
    size = settings.size
    encoder = {size: 0, 8: 1, 4: 2, 1: 1}
    decoder = {1: 1, 4: 3, 8: 2, 16: 1, size: 0}
    return encoder, decoder, {size: 16, 16: 32, 8: 64, 4: 128, 1: settings.z_dim}


def option(text, low=-math.inf, high=math.inf, choices=None, default=None):
    """A field of a dataclass of options. low, high: its range; choices: the values it may have."""
    return field(default=default, metadata=dict(text=text, range=(low, high), choices=choices))


@dataclass
class Options:
    """What both classes of options have in common. Raises UserError if a value is invalid."""

    out: str = option('folder of the run (train: else runs/<data>)')
    form: str = option('formulation of stage 2, or uncond, the baseline', choices=FORMS)
    data: str = option(f'{", ".join(DATA_SETS)}, or a folder of pictures')
    root: str = option('folder where the files of a named set are, or go')
    device: str = option('cpu, cuda, cuda:1, mps (default: cuda if there is one)')
    seed: int = option('seed of weights, batches, z and noise', low=0, high=2**63 - 1, default=0)

    def __post_init__(self):
        for setting in fields(self):
            value = getattr(self, setting.name)
            choices = setting.metadata['choices']
            if value is not None and choices is not None and value not in choices:
                raise UserError(f'{flag(setting.name)} {value}: not one of {list(choices)}')
            low, high = setting.metadata['range']
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, (int, float)) and not low <= number <= high:
                    raise UserError(f'{flag(setting.name)} {value}: must be from {low} to {high}')


@dataclass
class TrainingOptions(Options):
    """The settings of a training run, which its checkpoint keeps; None for the other stage's."""

    stage: int = option('1 trains the VAE, 2 the diffusion model', choices=(1, 2))
    preset: str = option("small is ours, the others are the paper's", choices=PRESETS)
    size: int = option('height and width of the images', low=16, high=4096, default=32)
    flip: bool = option('mirror a random half of each batch', default=False)  # may hold text
    z_dim: int = option('numbers in the code z', low=2, high=65536)
    kl_weight: float = option('VAE: weight of the KL', low=0, high=1e9)
    signal: str = option('what the VAE models of an image', choices=SIGNALS)
    channels: int = option('U-Net: channels of its stem', low=4, high=65536)
    multipliers: tuple = option('U-Net: multiplier of the channels, for each level', low=1)
    blocks: int = option('U-Net: residual blocks a level', low=1, high=100)
    attention: tuple = option('U-Net: resolutions that attend besides the bottleneck', low=1)
    heads: int = option('U-Net: heads of its attention', low=1, high=65536)
    dropout: float = option('U-Net: dropout in its blocks', low=0, high=0.99)
    z_cond: bool = option('U-Net: show it z besides the draft')
    cond_drop: float = option('share of images without draft, for guidance', low=0, high=0.99)
    batch: int = option('images a step, of all processes', low=1, high=1_000_000)
    parts: int = option('parts of a step, one after the other, to save memory', low=1, default=1)
    epochs: int = option('passes over the images, where --steps is not given', low=1)
    steps: int = option('training steps (instead of --epochs, if any); more extend a run', low=1)
    lr: float = option("Adam's learning rate", low=0, high=1)
    warmup: int = option('steps over which the learning rate rises', low=1, default=100)
    cooldown: float = option('share of the steps, the last, over which it falls', 0, 1, default=1.0)
    clip: float = option('largest norm of the gradient; inf for none', low=1e-6)
    ema: float = option('decay of the averaged weights; 0 for none', 0, 1, default=0.9999)
    save_every: float = option('seconds between checkpoints', low=0, default=60.0)
    vae: dict = option('in stage 2, the settings of stage 1; no option of the command line')


def resolve(typed, before, path):
    """The settings of a run: what was typed, else the checkpoint's, else the preset's.

    typed: {option: value}; before: the settings that the checkpoint at `path` fixes, or {}; those
    that it lacks take their defaults. Raises UserError if a fixed one was typed otherwise.
    """
    # These may change: the places of files (other images are refused when they are read), the
    # length of the run, its device and parts, and how often it is saved.
    free = ('out', 'root', 'data', 'steps', 'parts', 'device', 'save_every')
    for name, value in typed.items():
        if name in before and name not in free and before[name] != value:
            raise UserError(f'{flag(name)} {value}: {path} has {before[name]}')
    given = {'preset': 'small'} | before | typed
    return TrainingOptions(**(PRESETS[given['preset']][given['stage']] | given))


def refuse_what_does_not_fit(settings):
    """Raise a UserError if settings do not fit each other, before pictures are read."""
    if settings.batch % (WORLD * settings.parts):
        sharers = f'{WORLD} processes times {settings.parts} --parts'
        raise UserError(f'--batch {settings.batch}: {sharers} cannot share it equally')
    size = settings.size
    if settings.stage == 1:
        _, _, widths = vae_layout(settings)
        if size != max(widths) or size % 16:
            raise UserError(f'--size {size}: a --preset has its own; small has multiples of 16')
        return

    # The time embedding needs an even number of channels, and 32 groups need a multiple of 32.
    sizes = [size // 2**level for level in range(len(settings.multipliers))]
    divisor = 32 if settings.channels >= 128 else 2
    wrong = {
        f'--channels: {divisor} must divide it': settings.channels % divisor,
        f'--multipliers: {size} pixels cannot be halved so often': size % 2 ** (len(sizes) - 1),
        f'--attention: the levels have {sizes} pixels': set(settings.attention) - set(sizes),
        f'--heads: must divide --channels {settings.channels}': settings.channels % settings.heads,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(message)


@dataclass
class SamplingOptions(Options):
    """The settings of a command that generates images; None for those that it does not use."""

    sampler: str = option('the rule of a step', choices=SAMPLERS)
    spacing: str = option('how the times are spaced', choices=SPACINGS)
    guidance: float = option('its weight, for models with --cond-drop', low=0, high=100)
    steps: int = option('steps, a network call each (two if guided)', low=1, high=1000)
    num: int = option('how many images; in a row, where there are rows', low=1)
    gmm: int = option('Ex-PDE: z from a mixture of K Gaussians', low=1)
    png: bool = option('a folder of single images instead of a grid')
    attribute: str = option("circle, size, '3 - three', truck, Smiling; a folder has none")
    seeds: int = option('seeds, from --seed on', low=1, high=1000)
    picture: str = option('name of its pictures; no option of the command line')


# The defaults of all commands that generate images. COMMANDS adds what each has besides.
SAMPLING = dict(out='runs/shapes', form=None, data=None, root=None, device=None, seed=0)
SAMPLING |= dict(sampler='ddpm', spacing='quadratic', guidance=0.0, steps=50)


# ==== 7. TRAINING, one loop for both stages =======================================================
# A stage is a module: `forward` returns its losses, `random_inputs` draws what a step needs.
#
# Whatever is random in step s is a function of (seed, s) alone: which images, their noise, dropout
# (of several processes each has masks of its own). So a run that is resumed needs no state of a
# generator, and makes the weights of one that was not interrupted: bit for bit on a CPU with the
# same number of threads.


def choose_device(name):
    """The device of a name, by default CUDA, if there is one, else the CPU; turns TF32 off."""
    # float32 means float32. TF32, which a GPU takes in its place for convolutions, rounds to 10
    # bits: an error of 0.05%, which `predict_x0` makes 8% at T.
    torch.backends.cudnn.allow_tf32 = False
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        if WORLD > 1 and name == 'cuda':
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))  # which of the GPUs `cuda` is
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {name}: {error}') from error


def has_fast_bfloat16(device):
    """Whether bfloat16 is known to be fast on the device."""
    # It has the range of float32 with 8 bits of precision: enough for a U-Net, and fast where
    # there are units for it. Emulated it is slower than float32. The VAE, the losses, the averages
    # and the weights themselves stay in float32.
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpuinfo = Path('/proc/cpuinfo')  # only Linux tells
    cpu = cpuinfo.read_text() if device.type == 'cpu' and cpuinfo.exists() else ''
    return 'amx_bf16' in cpu or ('avx512_bf16' in cpu and 'AuthenticAMD' in cpu)


def build(settings, channels):
    """A VAE or a DiffuseVAE with fresh weights, for images of so many channels."""
    if settings.stage == 1:
        layout = vae_layout(settings)
        return VAE(channels, settings.size, *layout, settings.kl_weight, settings.signal)
    vae = None
    if settings.vae is not None:
        vae = build(resolve({}, settings.vae, None), channels)  # by the settings of its stage 1

    # The U-Net of the baseline sees x_t alone; the others the draft beside it, as more channels.
    in_channels = channels if vae is None else 2 * channels
    layers = dict(channels=settings.channels, multipliers=settings.multipliers)
    layers |= dict(blocks=settings.blocks, attention=settings.attention, heads=settings.heads)
    layers |= dict(dropout=settings.dropout, z_dim=vae.z_dim if settings.z_cond else 0)
    unet = UNet(in_channels, channels, settings.size, **layers)
    return DiffuseVAE(vae, unet, Diffusion(linear_schedule()), settings.form, settings.cond_drop)


def place(model, device):
    """The module of a stage on a device, in the layout and the precision that are fast there."""
    # channels_last is the faster layout on CPUs and CUDA. Elsewhere it is little tested.
    if device.type in ('cpu', 'cuda'):
        model = model.to(memory_format=torch.channels_last)
    if isinstance(model, DiffuseVAE):
        model.unet.bfloat16 = has_fast_bfloat16(device)
    return model.to(device)


def checkpoint_path(out, form):
    """The file of the checkpoint of a form of stage 2; for None, of stage 1."""
    name = 'stage1.pt' if form is None else f'stage2-{FORMS[form]}.pt'
    return Path(os.path.expanduser(out)) / name


def load_checkpoint(path):
    """What `train` or `mixture_of_codes` saved, on the CPU; None if there is no such file."""
    # A pickle may hold code, and would run it. With weights_only it is read as data and nothing
    # else, so that a checkpoint from a stranger can be opened.
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
        resolve({}, saved['settings'], path)
    except (UserError, OSError, MemoryError):
        raise  # the file may be good
    except Exception as error:  # torch raises nearly anything on a damaged file
        raise UserError(f'{path}: no checkpoint of this program; move it away') from error
    return saved


def load_training_images(settings, path):
    """The training images of a run, 16 held-out ones, and facts that tell them from others."""
    # A run in its folder of images would train on its own pictures.
    if settings.data not in DATA_SETS and Path(settings.data).resolve() in path.resolve().parents:
        raise UserError(f'--out {path.parent}: is inside of --data {settings.data}')

    # All processes hold the images, but the first may have to download them: the others wait. If it
    # fails, torchrun ends them.
    if WORLD > 1:
        torch.distributed.init_process_group(timeout=timedelta(days=1))
    if RANK > 0:
        torch.distributed.barrier()
    images = load_images(settings, train=True)
    channels = images.pixels.shape[1]
    held_out = load_images(settings, train=False, num=16, channels=channels)
    if RANK == 0 and WORLD > 1:
        torch.distributed.barrier()

    # The first eight images tell a set from others. (A slice without `clone` would be saved with
    # all the memory that it is a part of.)
    first = images.pixels[:8].clone()
    return images, held_out, {'number': len(images.pixels), 'channels': channels, 'first': first}


def same_images(facts, other_facts):
    """Whether two sets of images are the same, but for the rounding of another machine."""
    # Decoders of pictures, and even sines, differ in the last bit from machine to machine: so a few
    # pixels may be off by a grey level, but not by one on average.
    first = facts['first'].float()
    other = other_facts['first'].float()
    alike = facts['number'] == other_facts['number'] and first.shape == other.shape
    return alike and (first - other).abs().mean().item() < 1


def training_inputs(model, images, settings, step, device):
    """This process's share of the inputs of a step: {argument of forward: tensor on the device}.

    The whole batch is a function of (seed, step), whatever the number of processes.
    """
    # Draw the batch: which images, which of them mirrored, and what the module asks for. Images are
    # drawn with replacement, not shuffled once an epoch: a step depends on no step before it.
    generator = make_generator(settings.seed, 'step', step)
    x = images.batch(torch.randint(len(images.pixels), (settings.batch,), generator=generator))
    mirrored = torch.rand(settings.batch, 1, 1, 1, generator=generator) < 0.5 * settings.flip
    x = torch.where(mirrored, x.flip(3), x)
    inputs = {'x': x} | model.random_inputs(x.shape, generator)

    # Of WORLD processes each takes every WORLD-th image.
    return {name: tensor[RANK::WORLD].to(device) for name, tensor in inputs.items()}


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


def check_losses(losses, norm, step):
    """Warn if the code carries nothing; raise UserError if the run is lost.

    losses: means over the steps since the last check, by name; norm: the last gradient's.
    """
    # Weights that are not finite stay so: the last norm shows it.
    if not all(math.isfinite(value) for value in (*losses.values(), norm)):
        message = f'a loss or gradient in the steps up to {step} is not finite'
        raise UserError(f'{message}: start anew in another --out, with a lower --lr or --clip')

    # A VAE can collapse: the decoder ignores z and draws one mean picture, and the KL is 0. It
    # rarely recovers from that.
    if step == 300 and losses.get('kl', 1) < 0.05:
        message = f'step {step}: the code carries nothing (KL {losses["kl"]:.2g} nats)'
        complain(f'warning: {message}: all drafts are alike; try a smaller --kl-weight')


def find_run(typed, device):
    """What a run of `train` starts from: (path, settings, checkpoint, `Trained` stage 1).

    typed: the options that were given. The checkpoint is None for a new run. Stage 1 is None except
    for a new run of stage 2, which takes over its images and, if it is not the baseline, its VAE.
    """
    # A run is a folder, with a checkpoint for each stage and form. Where there is one, it goes on.
    stage = typed['stage']
    form = None if stage == 1 else typed.get('form', '1')
    data = typed.get('data') or PRESETS[typed.get('preset', 'small')][stage]['data']
    path = checkpoint_path(typed.get('out', f'runs/{Path(data).name}'), form)
    saved = load_checkpoint(path)
    if saved is not None:  # what it lacks has its default, which cannot be changed either
        before = asdict(resolve({}, saved['settings'], path))
        return path, resolve(typed, before, path), saved, None

    # Else stage 2 begins where stage 1 ended. The baseline needs no stage 1; but if there is one,
    # it takes the same images, for a comparison.
    path_1 = checkpoint_path(path.parent, None)
    if stage == 1 or (form == 'uncond' and not path_1.exists()):
        return path, resolve(typed, {}, path), None, None
    stage_1 = load(path.parent, None, device)
    if stage_1.step < stage_1.settings.steps:
        complain(f'warning: {path_1} is not complete; its VAE is used as it is')
    taken = {name: getattr(stage_1.settings, name) for name in ('preset', 'data', 'root', 'size')}
    if form != 'uncond':  # so its checkpoint has all of the VAE in it, whatever becomes of stage 1
        taken['vae'] = asdict(stage_1.settings)
    return path, resolve(typed, taken, path_1), None, stage_1


def new_model(settings, stage_1, images, device):
    """The module of a run at step 0. stage_1: the `Trained` that it builds on, or None."""
    # torch draws initial weights from its own generator: they are a function of the seed.
    torch.manual_seed(settings.seed)
    model = build(settings, images.pixels.shape[1])
    if settings.stage == 2:
        if model.vae is not None and stage_1 is not None:
            model.vae.load_state_dict(stage_1.model.state_dict())
        return place(model, device)

    # The small VAE trains for minutes. With He's initial weights its blocks contribute from the
    # start, and places are learnt sooner (NOTES 4). The paper's presets keep torch's.
    for module in model.modules():
        if isinstance(module, VAEBlock) and settings.preset == 'small':
            for conv in module.convs:
                nn.init.kaiming_normal_(conv.weight)

    # The encoder sees colours relative to the mean colour of y, and the decoder starts from it.
    # Where most pixels are black, or white, training would first drive the last sigmoid to its flat
    # end, where no gradient reaches the code (NOTES 4).
    n = min(1000, 10**8 // images.pixels[0, 0].numel())  # x and y have at most 2.4 GB
    y = model.signal(images.batch(slice(n)))
    mean = y.mean(dim=(0, 2, 3)).clamp(0.01, 0.99)  # [C]
    model.mean_colour.copy_(rearrange(mean, 'c -> c 1 1'))
    model.head.bias.data.copy_(torch.logit(mean))
    return place(model, device)


def rows_to_look_at(trained, held_out):
    """The picture of a training run: rows [(label, images)], of 16 held-out or new images."""
    # Stage 1: what the VAE models of held-out images, above their drafts. Stage 2: drafts above new
    # images.
    if trained.settings.stage == 2:
        return list(trained.generate(16).items())
    x = held_out.batch(slice(16))
    mu, _ = trained.encode(x)
    return [('y', trained.vae.signal(x)), ('draft', trained.decode(mu))]


def train(typed):
    """The command `train`: start, resume or extend a run. typed: the options that were given."""
    # Both stages go through here; what tells them apart is in the module and its settings. Settings
    # that do not fit are refused first, before pictures are read.
    device = choose_device(typed.get('device'))
    path, settings, saved, stage_1 = find_run(typed, device)
    refuse_what_does_not_fit(settings)
    start = saved['step'] if saved else 0
    path.parent.mkdir(parents=True, exist_ok=True)

    # The images. A run goes on with those that it, or its stage 1, began with.
    images, held_out, facts = load_training_images(settings, path)
    known = saved['images'] if saved else stage_1.facts if stage_1 else facts
    if not same_images(facts, known):
        raise UserError(f'--data {settings.data}: not the images that {path.parent} began with')
    if settings.steps is None:
        settings.steps = math.ceil(settings.epochs * facts['number'] / settings.batch)
    source = f'{facts["number"]} images of --data {settings.data}'
    PROGRESS.show(f'{path}: steps {start} to {settings.steps} on {device}, {source}', end=True)

    # The model, and its averaged copy, which is what samples are drawn with. (A `fused` Adam passes
    # over all weights at once; not every device has it.)
    model = new_model(settings, stage_1, images, device)
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pairs = zip(averaged.parameters(), model.parameters())
    averages = [average for average, parameter in pairs if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=settings.lr, fused=device.type in ('cpu', 'cuda'))
    if saved:
        model.load_state_dict(saved['model'])
        averaged.load_state_dict(saved['ema'])
        optimizer.load_state_dict(saved['optimizer'])
    trained = Trained(path, settings, averaged, facts, start, device)

    # Of several processes each has all weights and a share of the batch. DistributedDataParallel
    # averages the gradients over them, during the backward pass: so all take the same step.
    parallel = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model

    recent = []  # losses since the last line of progress
    began = saved_at = time.monotonic()
    for step in range(start, settings.steps):
        # Inputs are a function of (seed, step). Dropout draws from torch's own generator.
        inputs = training_inputs(model, images, settings, step, device)
        torch.manual_seed(seed_of(settings.seed, 'dropout', step, RANK))

        # Adam divides a gradient by its usual size, which it does not know yet in the first steps:
        # the learning rate rises to its value, lest those steps be wild. If there is a cooldown, it
        # falls to 0 at the end: large steps learn fast, but cannot settle in the minimum.
        # (A run that is extended goes on with the rate that the longer run has at this step.)
        rise = (step + 1) / settings.warmup
        fall = (settings.steps - step) / max(1, settings.cooldown * settings.steps)
        optimizer.param_groups[0]['lr'] = settings.lr * min(1, rise, fall)

        # Forward and backward. Between them every layer's output is kept, which takes most of the
        # memory. As the loss is a mean over images, so is its gradient: the batch may be computed
        # in equal parts, one after the other, whose gradients `backward` adds up.
        optimizer.zero_grad()
        for part in range(settings.parts):
            share = {name: tensor[part :: settings.parts] for name, tensor in inputs.items()}
            losses = parallel(**share)
            (losses['loss'] / settings.parts).backward()
            recent.append(torch.stack(list(losses.values())).detach())

        # A step of Adam. A gradient that is much longer than usual, from a rare batch, is scaled
        # down to the norm `clip`.
        norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()

        # The averaged weights follow. Buffers are copied: a batch norm, if somebody builds one in,
        # has its statistics in them.
        ema_update(averages, parameters, step, settings.ema)
        for average, buffer in zip(averaged.buffers(), model.buffers()):
            average.copy_(buffer)

        # Every ten steps and at the end a line of progress: only then are losses read, which makes
        # a GPU wait.
        trained.step = step + 1
        last = trained.step == settings.steps
        if trained.step % 10 != 0 and not last:
            continue
        means = torch.stack(recent).mean(dim=0).tolist()
        recent = []
        check_losses(dict(zip(losses, means)), norm.item(), trained.step)
        rate = (trained.step - start) / (time.monotonic() - began)
        text = '  '.join(f'{name} {mean:.4g}' for name, mean in zip(losses, means))
        left = f'{(settings.steps - trained.step) / rate / 60:.1f} min left'
        text = f'step {trained.step}/{settings.steps}  {text}'
        PROGRESS.show(f'{text}  {rate * settings.batch:.0f} images/s  {left}', end=last)

        # From time to time a checkpoint, with all that the next step depends on: a kill costs what
        # has been trained since the last one. And a picture, since a falling loss is no proof.
        if RANK == 0 and (last or time.monotonic() - saved_at > settings.save_every):
            content = dict(settings=asdict(settings), images=facts, step=trained.step)
            content |= dict(model=model.state_dict(), ema=averaged.state_dict())
            content |= dict(optimizer=optimizer.state_dict())
            write_atomically(path, partial(torch.save, content))

            write_grid(path.with_suffix('.png'), rows_to_look_at(trained, held_out))
            saved_at = time.monotonic()

    how = 'a larger --steps extends it, with the learning rate of a run of so many steps'
    PROGRESS.show(f'complete; look at {path.with_suffix(".png")}; {how}', end=True)


# ==== 8. SAMPLING =================================================================================
# z ~ N(0, I), x_hat = decoder(z), then the reverse chain. New images are drawn in chunks. What is
# random in a chunk is a function of (seed, chunk): so image i is the same, up to rounding, however
# many are drawn. Noise is drawn on the CPU, so that it is the same for all devices.


@dataclass(eq=False)  # hashable, for @cache
class Trained:
    """A trained stage with its averaged weights: what all commands, and notebooks, draw with.

    Images and codes that its methods take and return are on the CPU, images [n, C, H, W] in [0, 1].
    `encode` and `decode` raise UserError for the baseline, which has no VAE.
    """

    path: Path  # of its checkpoint
    settings: TrainingOptions
    model: nn.Module  # a DiffuseVAE, or, of stage 1, a VAE
    facts: dict  # of its images: number, channels, the first ones
    step: int  # how long it was trained
    device: torch.device

    @property
    def chunk(self):
        """How many images are drawn at once: 64, fewer above 64x64 pixels, 4 of 256x256."""
        return max(1, min(64, 512**2 // self.settings.size**2))

    @property
    def vae(self):
        """The VAE, also that of a `DiffuseVAE`."""
        vae = self.model if self.settings.stage == 1 else self.model.vae
        if vae is None:
            raise UserError(f'{self.path}: --form uncond has no VAE, and so no codes')
        return vae

    def images(self, train, num=None):
        """The training or the held-out `Images`: all, or num in random order."""
        return load_images(self.settings, train, num, self.facts['channels'])

    def encode(self, x):
        """q(z|x_0) of images: mu and logvar, each [n, z_dim]."""
        mu, logvar = self.vae.encode(x.to(self.device))
        return mu.cpu(), logvar.cpu()

    def encode_all(self, images):
        """q(z|x_0) of all `Images`."""
        # In chunks: as floats a whole set would be four times as large as its bytes.
        chunks = torch.arange(len(images.pixels)).split(self.chunk)
        mu, logvar = zip(*[self.encode(images.batch(indices)) for indices in chunks])
        return torch.cat(mu), torch.cat(logvar)

    def decode(self, z):
        """The drafts of codes z [n, z_dim]."""
        return self.vae.decode(z.to(self.device)).cpu()

    def noise(self, n, generator):
        """A function that draws new noise [n, C, H, W] at each call; n = 1: all images share it."""
        shape = (n, self.facts['channels'], self.settings.size, self.settings.size)
        return partial(torch.randn, shape, generator=generator)

    def shared_noise(self, seed, key='shared noise'):
        """New `noise` that all images share in each step, so that only z differs.

        Make one for each painting: a used one does not start again.
        """
        return self.noise(1, make_generator(seed, key))

    def paint(self, options, z, noise, draft=None, passed=None):
        """Draft and refine codes z [n, z_dim]: images by name, 'draft' and 'refined'.

        options: a `SamplingOptions`; noise: a function as from `noise`, of 1 or at least n images;
        draft: in place of the decoder's; passed: as for `Diffusion.sample`.
        """
        if options.guidance > 0 and self.model.cond_drop == 0:
            raise UserError(f'--guidance: {self.path} was trained without --cond-drop')

        # Noise comes for a whole chunk, however few images are wanted: so image i stays the same.
        def draw_noise():
            return noise()[: len(z)].to(self.device)

        how = dict(steps=options.steps, sampler=options.sampler, spacing=options.spacing)
        how |= dict(guidance=options.guidance, passed=passed)
        draft = None if draft is None else draft.to(self.device)
        x_T = draw_noise().expand(len(z), -1, -1, -1)
        images = self.model.generate(z.to(self.device), x_T, draw_noise, draft, **how)
        return {name: batch.cpu() for name, batch in images.items()}

    def new_chunk(self, options, start):
        """Images by name: the chunk of codes from the prior that begins with image `start`."""
        generator = make_generator(options.seed, 'chunk', start // self.chunk)
        z = torch.randn(self.chunk, self.model.z_dim, generator=generator)
        if options.gmm is not None:  # z = m_k + L_k eps for a random k, with L_k L_k^T = S_k
            weights, means, factors = mixture_of_codes(self, options.gmm)
            k = torch.multinomial(weights, self.chunk, replacement=True, generator=generator)
            z = means[k] + torch.einsum('nij,nj->ni', factors[k], z)
        return self.paint(options, z[: options.num - start], self.noise(self.chunk, generator))

    def new_images(self, options):
        """Images by name of options.num codes from the prior."""
        chunks = [self.new_chunk(options, start) for start in range(0, options.num, self.chunk)]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def generate(self, num=8, z=None, draft=None, **chosen):
        """For notebooks: {'draft', 'refined'} of num new codes, of codes z, or of drafts.

        z: [n, z_dim]; all share one noise. draft: [n, C, H, W], to be refined in place of the
        decoder's; without z, with the codes that the encoder finds in it. chosen: steps, sampler,
        spacing, guidance, gmm and seed, as for the command `sample`.
        """
        # New images differ in code and noise. Given codes are to be compared, so they share it.
        options = SamplingOptions(num=num, **(SAMPLING | chosen))
        if z is None and draft is None:
            return self.new_images(options)
        codes = self.encode(draft)[0] if z is None else z
        return self.paint(options, codes, self.shared_noise(options.seed), draft)

    def write_picture(self, name, rows, columns=()):
        """Write rows [(label, images)] beside the checkpoint, and say where."""
        path = self.path.with_name(f'{name}-{FORMS.get(self.settings.form, "vae")}.png')
        write_grid(path, rows, columns)
        print(path)


def load(out='runs/shapes', form='1', device=None, data=None, root=None):
    """The `Trained` form in the folder of a run; form None is stage 1. UserError if it is missing.

    data, root: where its images are now, if they have moved.
    """
    path = checkpoint_path(out, form)
    saved = load_checkpoint(path)
    if saved is None:
        how = f'--stage 2 --form {form}' if form else '--stage 1'
        raise UserError(f'no {path}: first train {how}, or give its --out')
    settings = resolve({}, saved['settings'], path)
    settings = replace(settings, data=data or settings.data, root=root or settings.root)

    device = choose_device(device)
    model = build(settings, saved['images']['channels'])
    model.load_state_dict(saved['ema'])
    model = place(model, device).requires_grad_(False).eval()  # nothing below needs torch.no_grad
    return Trained(path, settings, model, saved['images'], saved['step'], device)


def load_all(options):
    """Yield the `Trained` forms of --out, or --form alone, each checked against the first.

    UserError if there is none, or if the next is of other images or has another VAE.
    """
    first = None
    forms = [form for form in FORMS if checkpoint_path(options.out, form).exists()] or ['1']
    for form in [options.form] if options.form else forms:
        trained = load(options.out, form, options.device, options.data, options.root)
        first = first or trained
        if not same_images(trained.facts, first.facts):
            raise UserError(f'--out {options.out}: its models are of different images; give --form')
        vae = trained.model.vae  # the baseline, which has none, comes last
        if vae is not None and not torch.equal(vae.head.weight, first.model.vae.head.weight):
            raise UserError(f'--out {options.out}: its models have different VAEs; give --form')
        yield trained


def sample(options):
    """The command `sample`: a grid of drafts above refined images, or a folder of PNGs."""
    # A grid to look at; PNGs to compute FID with, for which 50,000 are customary.
    trained = next(load_all(options))
    if options.png:
        write_pngs(trained, options)
        return

    # Sixteen in a row, each draft above what was made of it.
    images = trained.new_images(options)
    rows = [(name, images[name][i : i + 16]) for i in range(0, options.num, 16) for name in images]
    trained.write_picture(options.picture, rows)


def write_pngs(trained, options):
    """Write single images, as <folder>/refined/000000.png and so on, and their drafts beside them.

    The folder's name says what was typed, and how long the model was trained. So files that exist
    are valid, and an interrupted command goes on. Processes of torchrun share the chunks.
    """
    name = f'{options.picture}-{FORMS[trained.settings.form]}-trained{trained.step}'
    folder = trained.path.with_name(name)

    # Chunk by chunk, the refined images last: where they exist, their drafts do.
    for start in range(RANK * trained.chunk, options.num, WORLD * trained.chunk):
        numbers = range(start, min(start + trained.chunk, options.num))
        if not all((folder / 'refined' / f'{i:06}.png').exists() for i in numbers):
            for name, images in trained.new_chunk(options, start).items():
                for i, pixels in zip(numbers, to_uint8(images)):
                    save = partial(to_pil_image(pixels).save, format='png')
                    write_atomically(folder / name / f'{i:06}.png', save)
        PROGRESS.show(f'{numbers.stop}/{options.num} images in {folder}')
    PROGRESS.show(f'{options.num} images are in {folder}', end=True)


# ==== PART 3: THE PAPER'S CLAIMS ==================================================================
# z controls the image, the draft is tolerated when damaged, few calls suffice, a better prior gives
# better images: commands show each by a picture or a table. NOTES 5 has the results.

# ==== 9. WHAT z CONTROLS ==========================================================================
# A code and a noise make an image: z decides the layout, the noise the detail. `reconstruct` and
# `chain` show it, `interpolate` and `edit` change one of the two, `robust` damages the draft in
# between. All start from mean codes of held-out images, and give all images of a picture one noise
# (except where it is the noise that changes), so that they differ by what was changed alone.


def slerp(a, b, w):
    """From a (w = 0) to b (w = 1) along the arc between them: tensors, each as one vector."""
    # sin((1 - w) theta) / sin(theta) a + sin(w theta) / sin(theta) b, theta the angle of a and b
    #
    # The mean of two noises has half of the variance that the network was trained on; the arc keeps
    # it (NOTES 2.8). For parallel vectors the weights are 0 / 0: the cosine is kept below 1.
    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-0.9999, 0.9999)
    theta = cosine.acos()
    return (((1 - w) * theta).sin() * a + (w * theta).sin() * b) / theta.sin()


def load_for_pictures(options, n):
    """A `Trained` model with a VAE, n held-out images [n, C, H, W], their mean codes [n, z_dim].

    Where there are fewer images, they are repeated.
    """
    trained = next(load_all(options))
    held_out = trained.images(train=False, num=n)
    x = held_out.batch([i % len(held_out.pixels) for i in range(n)])
    return trained, x, trained.encode(x)[0]


def reconstruct(options):
    """The command `reconstruct`: held-out images, the drafts of their mean codes, and refined."""
    # What the draft keeps, the refined image keeps; what it lost comes back, but not as it was.
    trained, x, mu = load_for_pictures(options, options.num)
    rows = [('image', x)]
    if trained.vae.signal is not SIGNALS['image']:
        rows.append(('y', trained.vae.signal(x)))
    rows += trained.paint(options, mu, trained.shared_noise(options.seed)).items()
    trained.write_picture(options.picture, rows)


def chain(options):
    """The command `chain`: the forward processes, and the reverse chain, at ten of its times."""
    trained, x, mu = load_for_pictures(options, n=1)

    # From left to right: time 0, which is the image, and up to ten of the chain's times. (The
    # chain itself falls through them, from right to left.)
    diffusion = trained.model.diffusion
    times = SPACINGS[options.spacing](diffusion.schedule, options.steps)[::-1]
    picked = torch.linspace(0, len(times) - 1, min(len(times), 10)).round().int().tolist()
    columns = ['0'] + [str(times[i] + 1) for i in picked]  # as in formulas: t = 1 ... T

    # Forward: one noise for all times, so that only its share changes. The paper's x_t of
    # Formulation 2 is ours plus the draft, from t = 1 on: its largest t is noise around the draft,
    # which stands below it.
    x_0 = 2 * x - 1
    draft = trained.decode(mu)
    eps = trained.shared_noise(options.seed, 'forward noise')()
    forward_1 = torch.cat([q_sample(x_0, diffusion.schedule[times[i]], eps) for i in picked])
    forward_2 = forward_1 + 2 * draft - 1
    rows = [
        ('forward 1', torch.cat([x, (forward_1 + 1) / 2])),
        ('forward 2', torch.cat([x, (forward_2 + 1) / 2])),
        ('draft', torch.cat([torch.ones(len(picked), *x.shape[1:]), draft])),
    ]

    # Reverse: what each chain passes through, x_t (of Formulation 2, too, without the draft) and
    # x_0_pred, all from the same noise. It ends in the image, at time 0.
    for run in load_all(options):
        passed = []
        own = options if run.model.vae is not None else replace(options, guidance=0.0)
        images = run.paint(own, mu, run.shared_noise(options.seed), passed=passed)
        x_t, x_0_pred = zip(*reversed(passed))
        for label, states in ((FORMS[run.settings.form], x_t), ('x_0_pred', x_0_pred)):
            shown = torch.cat([states[i] for i in picked]).cpu()
            rows.append((label, torch.cat([images['refined'], (shown + 1) / 2])))
    trained.write_picture(options.picture, rows, columns)


def interpolate(options):
    """The command `interpolate`: from one image's code to another's, and from noise to noise."""
    trained, _, mu = load_for_pictures(options, n=2)
    weights = torch.linspace(0, 1, options.num)

    # Between two codes, with the same noise for all.
    z = torch.stack([slerp(mu[0], mu[1], w) for w in weights])
    rows = list(trained.paint(options, z, trained.shared_noise(options.seed)).items())

    # Between two noises, with the first code: those of every step, since an ancestral chain adds
    # noise in each and forgets x_T.
    one = trained.shared_noise(options.seed)
    other = trained.shared_noise(options.seed, 'other noise')

    def between():
        ends = one(), other()
        return torch.cat([slerp(*ends, w) for w in weights])

    images = trained.paint(options, mu[:1].expand(len(weights), -1), between)
    rows.append(('new noise', images['refined']))
    trained.write_picture(options.picture, rows, [f'{w:.2f}' for w in weights])


def edit(options):
    """The command `edit`: move codes along the direction of an attribute."""
    # If z is a good description, an attribute is a direction in it: the same step makes any shape
    # wider, and leaves the rest. No attribute was used in training.
    trained, _, mu = load_for_pictures(options, n=3)

    # The direction: from the mean code of the images without the attribute to that of those with.
    # A few thousand tell it well enough.
    images = trained.images(train=True, num=5000)
    has = images.attributes.get(options.attribute)
    if has is None or has.all() or not has.any():
        known = ', '.join(images.attributes) or 'no attributes'
        raise UserError(f'--attribute {options.attribute}: true of none or of all; known: {known}')
    codes, _ = trained.encode_all(images)
    direction = codes[has].mean(dim=0) - codes[~has].mean(dim=0)

    strengths = torch.linspace(-2, 2, options.num)
    rows = []
    for code in mu:
        z = code + strengths[:, None] * direction
        rows += trained.paint(options, z, trained.shared_noise(options.seed)).items()
    trained.write_picture(options.picture, rows, [f'{strength:+.1f}' for strength in strengths])


def robust(options):
    """The command `robust`: refine a draft that is damaged more and more, in three ways."""
    # How far does the refiner trust the draft, and what does it repair?
    trained, _, mu = load_for_pictures(options, n=1)
    strengths = torch.linspace(0, 1, options.num)
    s = rearrange(strengths, 'n -> n 1 1 1')
    generator = make_generator(options.seed, 'robust')
    draft = trained.decode(mu)

    # At strength s: noise of deviation s / 2; a blur of 6 s pixels (and 0.01, as 0 is not allowed);
    # a share s of the blocks of 4x4 pixels, replaced by the mean. The diffusion model saw none of
    # them in training. (z is not changed, also where the U-Net sees it.)
    noisy = (draft + 0.5 * s * torch.randn(draft.shape, generator=generator)).clamp(0, 1)
    blurred = torch.cat([gaussian_blur(draft, 31, 0.01 + 6 * v.item()) for v in strengths])
    blocks = torch.rand(1, 1, draft.shape[2] // 4, draft.shape[3] // 4, generator=generator)
    missing = draft.where(F.interpolate(blocks, scale_factor=4) >= s, draft.mean())

    rows = []
    z = mu.expand(len(s), -1)
    for label, damaged in (('noise', noisy), ('blur', blurred), ('blocks', missing)):
        images = trained.paint(options, z, trained.shared_noise(options.seed), damaged)
        rows += [(label, damaged), ('refined', images['refined'])]
    trained.write_picture(options.picture, rows, [f'{strength:.2f}' for strength in strengths])


# ==== 10. QUALITY =================================================================================
# A distance between sets of images, and a better prior for z.


def laplacian_pyramid(x):
    """What each halving of the resolution loses, finest first, and the rest: [N, C, R, R] each."""
    # No level has less than 8 pixels a side: patches of 7x7 fit.
    levels = []
    while x.shape[-1] >= 16:
        low = F.interpolate(x, size=x.shape[-1] // 2, mode='bilinear', antialias=True)
        levels.append(x - F.interpolate(low, size=x.shape[-2:], mode='bilinear'))
        x = low
    return [*levels, x]


def sliced_wasserstein(images, real, patches=64, directions=128):
    """The distance of two sets [N, C, R, R] at each level of the Laplacian pyramid, times 1000.

    patches: of each image; directions: on which they are projected. Returns [levels]. Source:
    Karras et al., 2018. It needs no pretrained network, and cannot be compared with FID.
    """
    # In one dimension the Wasserstein distance of two samples is the mean absolute difference of
    # their sorted values. Patches of 7x7 pixels have 49 C dimensions: so it is averaged over random
    # directions. Both sets are normalised by the real one's mean and deviation: normalised by
    # their own, drifting colours and weak contrast would not show.
    generator = make_generator('sliced Wasserstein')
    distances = []
    for of_images, of_real in zip(laplacian_pyramid(images), laplacian_pyramid(real)):
        mean = of_real.mean((0, 2, 3), keepdim=True)
        std = of_real.std((0, 2, 3), keepdim=True)
        std = std.where(std > 0, math.inf)  # a channel that never varies has no weight
        n, channels, resolution, _ = of_real.shape

        # The same places of both sets' images, and the same directions.
        places = resolution - 6  # along each axis
        place = torch.randint(places**2, (n, patches), generator=generator)
        direction = F.normalize(torch.randn(channels * 49, directions, generator=generator), dim=0)
        projected = []  # sorted, of both sets
        for level in (of_images, of_real):
            # All patches, as a view that copies nothing: [n, channels, places, places, 7, 7]. Then
            # the chosen ones: [n, patches, channels, 7, 7].
            windows = ((level - mean) / std).unfold(2, 7, 1).unfold(3, 7, 1)
            chosen = windows[torch.arange(n)[:, None], :, place // places, place % places]
            numbers = rearrange(chosen, 'n p c y x -> (n p) (c y x)') @ direction
            projected.append(numbers.sort(dim=0).values)
        distances.append((projected[0] - projected[1]).abs().mean())
    return 1000 * torch.stack(distances)


def em_step(z, r, ridge=1e-6):
    """One step of EM for a mixture of K Gaussians.

    z: [N, D], in float64; r: responsibilities [N, K]. Returns (mixture, r, likelihood): the mixture
    (w [K], m [K, D], S [K, D, D]) that fits z and r, and by this mixture the new responsibilities
    [N, K] and the mean log-likelihood of z, [].
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


def fit_mixture(z, K, generator):
    """Fit K Gaussians to z [N, D]: (weights [K], means [K, D], covariances [K, D, D])."""
    # EM finds a maximum near its start. So start with k-means: every z to its nearest mean, every
    # mean to the middle of its z.
    means = z[torch.randperm(len(z), generator=generator)[:K]]
    for _ in range(10):
        nearest = torch.cdist(z, means).argmin(dim=1)
        r = F.one_hot(nearest, len(means)).to(z)  # [N, K]
        means = r.T @ z / r.sum(dim=0).clamp(min=1)[:, None]

    # Then EM, from responsibilities that are not quite one or zero: no component starts empty.
    r = 0.99 * r + 0.01 / len(means)
    before = -math.inf
    for iteration in range(1, 101):
        mixture, r, likelihood = em_step(z, r.clamp(min=1e-12))  # none becomes empty
        done = iteration == 100 or likelihood - before < 1e-3  # nats a code
        text = f'--gmm {K}: step {iteration} of EM, log-likelihood {likelihood:.3f}'
        PROGRESS.show(text, end=done)
        if done:
            return mixture
        before = likelihood


@cache
def mixture_of_codes(trained, K):
    """Ex-PDE: (weights [K], means [K, z_dim], Cholesky factors) of Gaussians fitted to the codes.

    Ex-PDE stands for ex-post density estimation. The codes of the training images are not quite
    N(0, I), so some z ~ N(0, I) fall where the decoder was never trained. Codes from a mixture
    fitted to z ~ q(z|x_0) do so less often.
    """
    # It takes a while, so it is kept beside the checkpoint, with weights that identify its VAE.
    path = trained.path.with_name(f'mixture{K}.pt')
    of_vae = trained.vae.mu.weight.cpu()
    saved = load_checkpoint(path)
    if saved is not None and torch.equal(saved['of_vae'], of_vae):
        return saved['mixture']

    # Each covariance needs several times as many codes as it has eigenvalues, z_dim. (As not all of
    # the images may be read, their number is not compared.)
    number = max(5000, 4 * K * trained.vae.z_dim)
    images = trained.images(train=True, num=number)
    if not same_images(trained.facts | {'first': images.pixels[:8]}, trained.facts):
        raise UserError(f'--data {trained.settings.data}: not the images of {trained.path}')
    mu, logvar = trained.encode_all(images)
    generator = make_generator('gmm')
    z = reparameterize(mu, logvar, torch.randn(mu.shape, generator=generator)).double()
    if trained.device.type == 'cuda':  # (MPS lacks float64)
        z = z.to(trained.device)
    weights, means, covariances = fit_mixture(z, K, generator)
    factors = torch.linalg.cholesky(covariances)
    mixture = [tensor.float().cpu() for tensor in (weights, means, factors)]
    content = dict(settings=asdict(trained.settings), of_vae=of_vae, mixture=mixture)
    if RANK == 0:
        write_atomically(path, partial(torch.save, content))
    return mixture


def evaluate(options):
    """The command `evaluate`: distances of new images to held-out ones, by model and steps."""
    runs = list(load_all(options))

    # The first n held-out images are a fair sample. The floor takes other training images for each
    # seed.
    held_out = runs[0].images(train=False, num=options.num)
    training = runs[0].images(train=True, num=options.num * options.seeds)
    num = min(len(held_out.pixels), len(training.pixels) // options.seeds)
    if num == 0:
        raise UserError(f'--seeds {options.seeds}: there are fewer training images')
    real = held_out.batch(slice(num))
    print(f'Distance to {num} held-out images (not FID): mean (lowest to highest seed; levels)')

    def report(name, sets):
        """Print a row: the distances of sets of images, one of each seed."""
        distances = torch.stack([sliced_wasserstein(images, real) for images in sets])
        by_seed = distances.mean(dim=1)  # [seeds]
        levels = ' '.join(f'{level:.1f}' for level in distances.mean(dim=0))
        span = f'({by_seed.min():.1f} to {by_seed.max():.1f}; {levels})'
        print(f'{name:34} {by_seed.mean():7.1f} {span}', flush=True)

    # The distance of training images is about the best to hope for. It is not 0, as the sets are
    # finite; nor may it be subtracted, as such distances do not add up.
    parts = [training.batch(slice(i * num, (i + 1) * num)) for i in range(options.seeds)]
    report('floor: training images', parts)

    # All models with the same sampler and spacing, row by row: like is compared with like.
    seeds = range(options.seed, options.seed + options.seeds)
    for run in runs:
        form = FORMS[run.settings.form]
        for steps in options.steps:
            own = replace(options, num=num, steps=steps)
            if form == 'uncond':  # it has no codes, and no draft to be guided by
                own = replace(own, gmm=None, guidance=0.0)
            sets = [run.new_images(replace(own, seed=seed)) for seed in seeds]
            if form != 'uncond' and steps == options.steps[0]:
                report(f'{form} drafts', [images['draft'] for images in sets])
            name = f'{form} {options.sampler} {options.spacing}, {steps} steps'
            report(name, [images['refined'] for images in sets])


# ==== PART 4: THE COMMAND LINE ====================================================================

# ==== 11. THE COMMAND LINE ========================================================================
# COMMANDS says which function runs a command, and which options it has, with their defaults; those
# of `train` come from its preset.

PICTURE = SAMPLING | dict(num=8)
NEW_IMAGES = SAMPLING | dict(num=64, gmm=None)
EVALUATION = NEW_IMAGES | dict(num=500, steps=(5, 10, 25), seeds=2)
COMMANDS = {
    'train': (train, {}, 'train a stage: start, resume or extend a run'),
    'sample': (sample, NEW_IMAGES | {'png': False}, 'drafts above refined images, or PNGs'),
    'reconstruct': (reconstruct, PICTURE, 'held-out images, their drafts, and refined'),
    'chain': (chain, SAMPLING, 'an image noised, and the way back, time by time'),
    'interpolate': (interpolate, PICTURE, 'between two codes, and between two noises'),
    'edit': (edit, PICTURE | {'attribute': ''}, 'move codes along the direction of an attribute'),
    'robust': (robust, PICTURE, 'damage a draft more and more before it is refined'),
    'evaluate': (evaluate, EVALUATION, 'distances to held-out images'),
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are the user's, in one line."""

    def error(self, message):
        raise UserError(message)


def whole_numbers(text):
    """'1,2,2' -> (1, 2, 2)."""
    return tuple(int(number) for number in text.split(',') if number)


def add_options(parser, options_class, defaults):
    """Give the parser an option for each field that `defaults` names."""
    for setting in [setting for setting in fields(options_class) if setting.name in defaults]:
        default = defaults[setting.name]
        shown = ','.join(map(str, default)) if isinstance(default, tuple) else default
        said = f' (default {shown})' if default not in (None, '', ()) else ''
        how = {'help': setting.metadata['text'] + said, 'default': argparse.SUPPRESS}
        if setting.type is bool:
            parser.add_argument(flag(setting.name), action=argparse.BooleanOptionalAction, **how)
        else:
            how['type'] = whole_numbers if isinstance(default, tuple) else setting.type
            how |= {'choices': setting.metadata['choices'], 'required': setting.name == 'stage'}
            parser.add_argument(flag(setting.name), **how)


def parse(argv):
    """The function of the command, and its options. UserError for bad ones."""
    # Which options `train` has depends on stage, form and preset: these have to be known first. (So
    # --preset is to be typed for stage 2, too, if its --epochs are to be changed.) All else is left
    # for the parser below.
    before = Parser(add_help=False, allow_abbrev=False)
    before.add_argument('--stage', type=int, choices=(1, 2), default=1)
    before.add_argument('--form')
    before.add_argument('--preset', choices=PRESETS, default='small')
    chosen, _ = before.parse_known_args(argv)
    shared = {name: value for name, value in asdict(TrainingOptions()).items() if value is not None}
    of_train = {'stage': None, 'preset': 'small'} | shared | PRESETS[chosen.preset][chosen.stage]
    if chosen.stage == 2 and chosen.form == 'uncond':  # it has no z to show, no draft to withhold
        del of_train['z_cond'], of_train['cond_drop']

    parser = Parser(prog='diffusevae.py', description='A VAE drafts, a diffusion model refines.')
    commands = parser.add_subparsers(required=True, metavar='COMMAND', dest='command')
    for name, (_, defaults, text) in COMMANDS.items():
        subparser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        options_class = TrainingOptions if name == 'train' else SamplingOptions
        add_options(subparser, options_class, of_train if name == 'train' else defaults)

    # `train` has to know what was typed, to tell it from what its checkpoint says.
    typed = vars(parser.parse_args(argv))
    command = typed.pop('command')
    run, defaults, _ = COMMANDS[command]

    # A picture, or a folder of them, is named after what was typed, except --num and the places of
    # files: another --num replaces it.
    unnamed = ('out', 'form', 'data', 'root', 'device', 'num', 'png')
    named = [f'{name}={typed[name]}' for name in sorted(typed) if name not in unnamed]
    picture = quote('-'.join([command, *named]), safe='=')
    return run, typed if run is train else SamplingOptions(picture=picture, **(defaults | typed))


def main(argv=None):
    """Run one command. Returns the exit code.

    0: success (Python itself exits with 1 after a traceback, a bug). 2: an error that the user can
    fix, such as a full disk or a full GPU. 130: interrupted.
    """
    try:
        run, options = parse(argv)
        run(options)
    except KeyboardInterrupt:
        complain('interrupted; the same command goes on from what it has saved, if anything')
        return 130
    except (UserError, OSError, torch.cuda.OutOfMemoryError) as error:
        is_full = isinstance(error, torch.cuda.OutOfMemoryError) and run is train
        hint = '; train --parts 2, or more, needs less' if is_full else ''
        complain(f'error: {error}{hint}')
        return 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')  # a console may lack the letters of a path
    sys.exit(main())
