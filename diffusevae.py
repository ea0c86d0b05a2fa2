"""DiffuseVAE in one file: a VAE drafts, a diffusion model refines.

Pandey, Mukherjee, Rai, Kumar: "DiffuseVAE: Efficient, Controllable and High-Fidelity Generation
from Low-Dimensional Latents", TMLR 2022, arXiv 2201.00308. An independent implementation to be read
beside the paper; it is not the authors' code. NOTES.md derives every formula used here.

    z ~ N(0, I) --> VAE decoder --> x_hat, a blurry draft --+
                                                            v (concatenated on the channel axis)
    y_T ~ N(0, I) ----> U-Net, T reverse diffusion steps: y_T -> ... -> y_0 = x_0, a sharp image

    z has a few dozen numbers, can be edited and interpolated, and fixes the layout; the diffusion
    model (DDPM) only paints the detail that the draft lacks, so few of its steps are enough.

Two stages, then images (the defaults: 32x32 coloured shapes that the file draws itself):

    python diffusevae.py train --stage 1             # the VAE             -> runs/shapes/stage1.pt
    python diffusevae.py train --stage 2             # the DDPM, on x_hat  -> stage2-form1.pt
    python diffusevae.py sample                      # drafts above refined images -> PNG
    python diffusevae.py train --stage 2 --form uncond           # the baseline: a DDPM without x_hat
    python diffusevae.py train --stage 1 --preset cifar10        # the paper's scale, on a GPU

@ATTAINS@

Sections, in the paper's order:

    1 DATA        2 VAE        3 DIFFUSION        4 U-NET        5 THE TWO-STAGE MODEL
    6 SETTINGS    7 TRAINING   8 SAMPLING         9 COMMAND LINE

Sections 2 to 5 are the method: tensors in, tensors out; no files, arguments or devices in them.
"""

import argparse
import copy
import csv
import hashlib
import io
import json
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid


class UserError(Exception):
    """Something the user can put right: `main` prints it as one line and returns 2."""


def generator(*key):
    """A CPU random generator that is a function of `key` alone, e.g. (seed, 'step', 17).

    This is the file's one rule of randomness: whatever is random in training step s comes from
    generator(seed, 'step', s). So runs repeat, and resuming needs no generator state.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], 'little') >> 1)


# ==================================================================================================
# 1. DATA
#
#    Every data set becomes `Images`: uint8 pixels, served as floats in [0, 1] (the VAE's range;
#    the diffusion model's is [-1, 1], converted where it is used), and labels by name.
#    Held-out images (a test split, 5% of a folder, another seed) never enter training.
# ==================================================================================================


def draw_shapes(n, generator, size=32):
    """Draw n images of a striped shape on a plain ground: uint8 [n, 3, size, size] and the factors.

    The factors (kind, hue, ground, x, y, size: a dict of [n]) are what a VAE can learn. The stripes,
    3.5 pixels wide with a random angle and phase, are the detail that it blurs and a DDPM restores.
    """
    u = torch.rand(8, n, 1, 1, generator=generator)  # eight uniform numbers an image
    kind = (4 * u[0]).long()
    center_x, center_y, radius = 0.38 + 0.24 * u[1], 0.38 + 0.24 * u[2], 0.24 + 0.12 * u[3]
    hue, ground, angle, phase = u[4], u[5], math.pi * u[6], 2 * math.pi * u[7]

    pixel = (torch.arange(size) + 0.5) / size  # pixel centres; the image is the unit square
    x, y = pixel - center_x, pixel[:, None] - center_y  # [n, 1, size], [n, size, 1]
    # Distances to the outline, negative inside, one for each kind of shape.
    circle = (x**2 + y**2).sqrt() - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.85 * radius
    triangle = torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.6 * radius
    bars = [torch.maximum(a.abs() - radius, b.abs() - 0.35 * radius) for a, b in ((x, y), (y, x))]
    cross = torch.minimum(*bars)
    distance = torch.stack([circle, square, triangle, cross])[kind.flatten(), torch.arange(n)]
    inside = (0.5 - size * distance).clamp(0, 1)[:, None]  # [n, 1, size, size], edges antialiased

    stripes = torch.sin(2 * math.pi / 3.5 * size * (x * angle.cos() + y * angle.sin()) + phase)

    def colour(hue, saturation, value):  # HSV -> RGB, [n, 1, 1] -> [n, 3, 1, 1]
        k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue) % 6  # [n, 1, 3]
        rgb = value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)
        return rearrange(rgb, 'n one c -> n c one 1')

    shape = colour(hue, 0.75, 0.7) * (1 + 0.35 * stripes[:, None])
    image = inside * shape + (1 - inside) * colour(ground, 0.4, 0.45)
    factors = dict(kind=kind, hue=hue, ground=ground, x=center_x, y=center_y, size=radius)
    return (255 * image).round().byte(), {name: f.flatten() for name, f in factors.items()}


class Files:
    """Image files read when asked for: `files[indices]` is uint8 [B, 3, size, size].

    `open_image(i)` returns a PIL image. What cannot be read is named in a warning, and in a batch
    the next readable image takes its place.
    """

    def __init__(self, names, open_image, fit):
        self.names, self.open_image, self.fit = names, open_image, fit
        self.pool = ThreadPoolExecutor(os.cpu_count())  # PIL decodes outside Python's lock

    def __len__(self):
        return len(self.names)

    def read(self, i):
        """Image i as uint8 [3, size, size], or None with a warning."""
        try:
            with self.open_image(i) as image:
                if image.mode.startswith('I;16'):  # 16 bits: keep the upper 8, `convert` would clip
                    image = image.point(lambda v: v / 256, 'L')
                return pil_to_tensor(self.fit(ImageOps.exif_transpose(image).convert('RGB')))
        except Exception as error:  # PIL's decoders raise nearly anything on a broken file
            print(f'warning: skipped {self.names[i]}: {error}', file=sys.stderr)

    def read_next(self, i):
        """Image i, or the first readable one after it."""
        for j in range(len(self)):
            image = self.read((int(i) + j) % len(self))
            if image is not None:
                return image
        raise UserError(f'none of the {len(self)} image files can be read')

    def __getitem__(self, indices):
        return torch.stack(list(self.pool.map(self.read_next, indices)))

    def in_memory(self):
        """All readable images: uint8 [N, 3, size, size]."""
        images = [image for image in self.pool.map(self.read, range(len(self))) if image is not None]
        if not images:
            raise UserError(f'none of the {len(self)} image files can be read')
        return torch.stack(images)


class Images:
    """A data set: `images.batch(indices)` is float [B, C, H, W] in [0, 1]; `labels[name]` is [N].

    `pixels` is a uint8 tensor [N, C, H, W] or `Files`; both are indexed in the same way.
    """

    def __init__(self, pixels, labels=None):
        self.pixels, self.labels = pixels, labels or {}

    def __len__(self):
        return len(self.pixels)

    def batch(self, indices):
        return self.pixels[indices].float() / 255


IN_MEMORY = 1e9  # bytes; larger sets of files are read batch by batch
DIGITS = ('mnist', 'fashion')  # 28x28 and grey: padded to 32x32 here, cropped back in pictures
WHAT_TO_PUT = {  # where torchvision looks below --root
    'mnist': 'MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte',
    'fashion': 'FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte',
    'cifar10': 'cifar-10-batches-py/{data_batch_1..5,test_batch}',
    'celeba': 'celeba/img_align_celeba/*.jpg, with list_attr_celeba.txt and the other lists',
}


def load_images(data, root='data', size=32, train=True):
    """The training or the held-out part of a data set by name, or of a folder of images by path.

    Raises UserError for what is unknown, missing, empty, or has another size.
    """
    if data == 'shapes':
        return Images(*draw_shapes(20_000 if train else 2_000, generator('shapes', train), size))
    if data in WHAT_TO_PUT:
        return load_torchvision(data, root, size, train)
    if not Path(data).is_dir():
        raise UserError(f'--data {data}: no such folder; choose a folder of images or one of '
                        f'shapes, {", ".join(WHAT_TO_PUT)}')
    endings = {'.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm'}
    paths = [p for p in Path(data).rglob('*') if p.suffix.lower() in endings]
    # Held out: the 5% of names whose hash is smallest, so that the choice outlives renamed parents
    # and added files; at least one image.
    hashed = {p: hashlib.sha256(p.relative_to(data).as_posix().encode()).digest() for p in paths}
    paths = sorted(paths, key=hashed.get)
    held_out = max(1, sum(hashed[p][0] < 256 / 20 for p in paths))
    if len(paths) <= held_out:
        raise UserError(f'--data {data}: {len(paths)} image files found, at least 2 are needed '
                        f'({" ".join(sorted(endings))})')
    paths = paths[held_out:] if train else paths[:held_out]
    files = Files(paths, lambda i: Image.open(paths[i]),
                  lambda image: ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
    return Images(files.in_memory() if len(files) * 3 * size**2 <= IN_MEMORY else files)


def load_torchvision(data, root, size, train):
    """MNIST, Fashion-MNIST, CIFAR-10 or CelebA, downloaded to `root` where torchvision can."""
    try:
        if data == 'celeba':
            celeba = datasets.CelebA(root, 'train' if train else 'test', download=True)
        else:
            kind = dict(mnist=datasets.MNIST, fashion=datasets.FashionMNIST,
                        cifar10=datasets.CIFAR10)[data]
            images = kind(root, train, download=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f'--data {data}: not under --root {root} and not to be downloaded; put '
                        f'there {WHAT_TO_PUT[data]} ({str(error).splitlines()[0]})') from error
    if data == 'celeba':
        # The authors squeeze 178x218 straight to a square, without a crop.
        files = Files(celeba.filename, lambda i: celeba[i][0], lambda im: im.resize((size, size)))
        labels = {name: celeba.attr[:, i] for i, name in enumerate(celeba.attr_names) if name}
        small = len(files) * 3 * size**2 <= IN_MEMORY
        return Images(files.in_memory() if small else files, labels)
    if size != 32:
        raise UserError(f'--size {size}: the images of --data {data} are 32x32')
    labels = torch.as_tensor(images.targets)
    if data == 'cifar10':
        return Images(rearrange(torch.from_numpy(images.data), 'n y x c -> n c y x'),
                      dict(label=labels))
    pixels = F.pad(images.data[:, None], (2, 2, 2, 2))  # [N, 1, 32, 32]
    return Images(pixels, dict(digit=labels) if data == 'mnist' else dict(label=labels))


@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The order in which one epoch visits n images: [n]."""
    return torch.randperm(n, generator=generator(seed, 'epoch', epoch))


def batch_indices(n, batch, seed, step):
    """Which images training step `step` sees: [batch], out of an endless row of shuffled epochs."""
    places = range(step * batch, (step + 1) * batch)
    return torch.stack([epoch_order(n, seed, p // n)[p % n] for p in places])


# ==================================================================================================
# 2. VAE: the generator of drafts
#
#    prior p(z) = N(0, I), encoder q(z|x) = N(mu(x), diag sigma^2(x)), decoder mean x_hat(z).
#    Stage 1 maximises the first line of the bound that the whole method rests on,
#
#    log p(x) >= E_q(z|x) log p(x|z) - KL( q(z|x) || p(z) )                               (VAE term)
#              + E_q(z|x) E_q(x_1:T|x_0,x_hat) log p(x_0:T|x_hat) / q(x_1:T|x_0,x_hat)   (DDPM term)
# ==================================================================================================


def reparameterize(mu, logvar, eps):
    """Draw z ~ N(mu, sigma^2) as a differentiable function of mu and logvar = log sigma^2.

    Shapes: all [B, z_dim]; the caller draws eps ~ N(0, I).
    """
    # z = mu + sigma * eps,  sigma = exp(logvar / 2)
    # The randomness sits in eps, which has no parameters; so dz/dmu = 1 and dz/dsigma = eps exist,
    # and the expectation over q(z|x) can be differentiated through its samples.
    return mu + torch.exp(logvar / 2) * eps


def kl_divergence(mu, logvar):
    """KL( N(mu, sigma^2) || N(0, I) ) of every example, in nats: [B, z_dim] -> [B]."""
    # KL = 1/2 sum_j (mu_j^2 + sigma_j^2 - 1 - log sigma_j^2)
    # E_q[log q - log p] needs only E_q[z^2] = mu^2 + sigma^2 and E_q[(z - mu)^2 / sigma^2] = 1.
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(dim=1)


def negative_elbo(x, x_hat, mu, logvar, alpha=1.0):
    """The loss of stage 1, averaged over the batch: (loss, squared error, KL), three scalars.

    Shapes: x and x_hat [B, C, H, W] in [0, 1], mu and logvar [B, z_dim]. alpha weighs the KL.
    """
    # loss = ||x - x_hat||^2 + alpha KL( q(z|x) || p(z) ), both summed over dimensions.
    # A Gaussian decoder N(x_hat, sigma_x^2 I) has -log p(x|z) = ||x - x_hat||^2 / (2 sigma_x^2)
    # + const. Times alpha := 2 sigma_x^2 its negative ELBO is this loss: alpha = 1 is the exact
    # bound for sigma_x^2 = 1/2, a smaller alpha the exact bound for a decoder of less variance.
    squared_error = (x - x_hat).square().sum(dim=(1, 2, 3)).mean()
    kl = kl_divergence(mu, logvar).mean()
    return squared_error + alpha * kl, squared_error, kl


class VAEBlock(nn.Module):
    """Residual bottleneck without normalisation: [B, width, R, R] -> the same shape."""

    def __init__(self, width, resolution):
        super().__init__()
        k = 3 if resolution > 1 else 1
        self.convs = nn.ModuleList([
            nn.Conv2d(width, width // 2, 1),
            nn.Conv2d(width // 2, width // 2, k, padding=k // 2),
            nn.Conv2d(width // 2, width // 2, k, padding=k // 2),
            nn.Conv2d(width // 2, width, 1),
        ])
        for conv in self.convs:
            nn.init.zeros_(conv.bias)

    def forward(self, h):
        r = h
        for conv in self.convs:
            r = conv(F.gelu(r))
        return h + r


def backbone(layers, width):
    """Build the authors' layer shorthand, e.g. '32x7,32d2,32t16'; width[R] = channels at R x R.

    RxN: N blocks at resolution R.  RdF: one block, then average pooling by F.
    RuF: nearest upsampling by F.   RtS: bias-free 1x1 convolution from width[R] to width[S].
    """
    modules = []
    for layer in layers.split(','):
        match = re.fullmatch(r'(\d+)([xdut])(\d+)', layer)
        if not match:
            raise ValueError(f'layer {layer!r} is none of RxN, RdF, RuF, RtS')
        resolution, kind, n = int(match[1]), match[2], int(match[3])
        needed = {resolution, n} if kind == 't' else {resolution}
        if not needed <= width.keys():
            raise ValueError(f'layer {layer!r} needs the width at {max(needed - width.keys())}')
        if kind == 'x':
            modules += [VAEBlock(width[resolution], resolution) for _ in range(n)]
        elif kind == 'd':
            modules += [VAEBlock(width[resolution], resolution), nn.AvgPool2d(n)]
        elif kind == 'u':
            modules += [nn.Upsample(scale_factor=n)]
        else:
            modules += [nn.Conv2d(width[resolution], width[n], 1, bias=False)]
    return nn.Sequential(*modules)


class VAE(nn.Module):
    """The paper's VAE; `forward` is the loss of stage 1.

    `encoder` and `decoder` are layer strings (see `backbone`) from `size` down to 1 and back;
    `width` maps resolutions to channels, and z_dim = width[1]. Images: [B, C, size, size] in [0, 1].
    """

    metrics = ('loss', 'squared_error', 'kl')

    def __init__(self, channels, size, encoder, decoder, width, alpha=1.0):
        super().__init__()
        self.z_dim, self.alpha = width[1], alpha
        self.stem = nn.Conv2d(channels, width[size], 3, padding=1, bias=False)
        self.encoder = backbone(encoder, width)
        self.mu = nn.Conv2d(width[1], self.z_dim, 1, bias=False)
        self.logvar = nn.Conv2d(width[1], self.z_dim, 1, bias=False)
        self.decoder = backbone(decoder, width)
        self.head = nn.Conv2d(width[size], channels, 3, padding=1)

    def encode(self, x):
        """q(z|x): [B, C, H, W] -> mu and logvar, each [B, z_dim]."""
        h = self.encoder(self.stem(x))  # [B, z_dim, 1, 1]
        return self.mu(h).flatten(1), self.logvar(h).flatten(1)

    def decode(self, z):
        """The draft x_hat, mean of p(x|z): [B, z_dim] -> [B, C, H, W] in [0, 1]."""
        return torch.sigmoid(self.head(self.decoder(rearrange(z, 'b z -> b z 1 1'))))

    def noise(self, n, generator):
        """What a training step on n images draws: eps [n, z_dim]."""
        return (torch.randn(n, self.z_dim, generator=generator),)

    def forward(self, x, eps):
        """The negative ELBO of a batch, see `negative_elbo`."""
        mu, logvar = self.encode(x)
        x_hat = self.decode(reparameterize(mu, logvar, eps))
        return negative_elbo(x, x_hat, mu, logvar, self.alpha)


# ==================================================================================================
# 3. DIFFUSION: one implementation for Formulation 1, Formulation 2 and the baseline
#
#    Formulation 1:  q(x_t|x_0)        = N(sqrt(alpha_bar_t) x_0,         (1 - alpha_bar_t) I)
#    Formulation 2:  q(x_t|x_0, x_hat) = N(sqrt(alpha_bar_t) x_0 + x_hat, (1 - alpha_bar_t) I)
#
#    Change of variables: y_t := x_t - x_hat for t >= 1, and y_0 := x_0, turns every formula of
#    Formulation 2 into Formulation 1's, the last step included (in Formulation 1 and the baseline
#    y_t := x_t). So this section knows only y; section 5 decides what the network is shown.
#    The proof is in NOTES.md, and the test `test_change_of_variables` checks it.
#
#    Every formula is written in alpha_bar = alpha_bar_t and alpha_bar_next, its value at the next,
#    smaller time of the chain (t - 1, or further on a coarser grid; 1 after the last step). Indices
#    run from 0 to T - 1: index t holds the paper's time t + 1.
# ==================================================================================================


def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    """alpha_bar_t = prod_{s <= t} (1 - beta_s) for beta linear in t: [T], float64."""
    # float64: the product of 1000 factors, and 1 - alpha_bar near 0, would lose digits in float32.
    return torch.cumprod(1 - torch.linspace(beta_1, beta_T, T, dtype=torch.float64), dim=0)


def q_sample(y_0, alpha_bar, eps):
    """Noise y_0 to time t at once; alpha_bar is a number or [B, 1, 1, 1], eps ~ N(0, I)."""
    # q(y_t|y_0) = N(sqrt(alpha_bar) y_0, (1 - alpha_bar) I): t steps y <- sqrt(1 - beta) y +
    # sqrt(beta) noise multiply y_0 by sqrt(alpha_bar), and a sum of Gaussians is Gaussian.
    return alpha_bar**0.5 * y_0 + (1 - alpha_bar) ** 0.5 * eps


def predict_x0(y_t, alpha_bar, eps):
    """The clean image that y_t and its noise imply: `q_sample` solved for y_0 (= x_0)."""
    # x_0 = (y_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)
    # An error in eps grows by sqrt(1/alpha_bar - 1): 157 at t = T. Hence the clip when sampling,
    # and the network's last layer in float32.
    return (y_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5


def q_posterior(x_0, y_t, alpha_bar, alpha_bar_next):
    """Mean and variance of q(y_next|y_t, x_0), the step back if x_0 were known."""
    # Bayes' rule for two Gaussians, q(y_t|y_next) = N(sqrt(1 - beta) y_next, beta I) and
    # q(y_next|x_0). On the full grid beta = 1 - alpha_bar / alpha_bar_next is beta_t; on a
    # coarser one it is the noise added between the two grid points.
    #   mean     = sqrt(alpha_bar_next) beta / (1 - alpha_bar) x_0
    #            + sqrt(1 - beta) (1 - alpha_bar_next) / (1 - alpha_bar) y_t
    #   variance = beta (1 - alpha_bar_next) / (1 - alpha_bar)
    beta = 1 - alpha_bar / alpha_bar_next
    c_0 = alpha_bar_next**0.5 * beta / (1 - alpha_bar)
    c_t = (1 - beta) ** 0.5 * (1 - alpha_bar_next) / (1 - alpha_bar)
    return c_0 * x_0 + c_t * y_t, beta * (1 - alpha_bar_next) / (1 - alpha_bar)


def ddpm_step(y_t, x_0, alpha_bar, alpha_bar_next, noise, sigma='large'):
    """Ancestral step: draw from the posterior with the predicted x_0; sigma 'small' or 'large'."""
    # sigma^2 = the posterior's own variance ("small", right if x_0 were a single image) or beta
    # ("large", right if x_0 were white noise of variance 1). After the last step, no noise.
    mean, variance = q_posterior(x_0, y_t, alpha_bar, alpha_bar_next)
    if sigma == 'large':
        variance = 1 - alpha_bar / alpha_bar_next
    return mean if alpha_bar_next == 1 else mean + variance**0.5 * noise


def ddim_step(y_t, x_0, alpha_bar, alpha_bar_next, noise, eta=0.0):
    """DDIM step: deterministic for eta = 0, the ancestral step with small variance for eta = 1."""
    # y_next = sqrt(alpha_bar_next) x_0 + sqrt(1 - alpha_bar_next - sigma^2) eps + sigma noise
    # has the same marginals q(y_next|x_0) for every sigma. eps is derived from the clipped x_0
    # again: with the network's own eps, y_next would lie on no path from x_0.
    eps = (y_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5
    sigma = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    sigma = eta * sigma**0.5
    direction = (1 - alpha_bar_next - sigma**2) ** 0.5 * eps
    return alpha_bar_next**0.5 * x_0 + direction + sigma * noise


def dpmpp_step(y_t, x_0, alpha_bar, alpha_bar_next, previous):
    """DPM-Solver++(2M) step (arXiv 2211.01095); previous = (x_0, alpha_bar) of the step before."""
    # In lambda = log sqrt(alpha_bar / (1 - alpha_bar)) the sampling ODE has an exact solution but
    # for the integral of x_0 over lambda; the last two x_0 extrapolate it to second order.
    # The last step has lambda = infinity and returns x_0.
    if alpha_bar_next == 1:
        return x_0
    log_snr = lambda a: 0.5 * math.log(a / (1 - a))
    h = log_snr(alpha_bar_next) - log_snr(alpha_bar)
    if previous is not None:
        x_0_before, alpha_bar_before = previous
        r = (log_snr(alpha_bar) - log_snr(alpha_bar_before)) / h
        x_0 = x_0 + (x_0 - x_0_before) / (2 * r)
    shrink = ((1 - alpha_bar_next) / (1 - alpha_bar)) ** 0.5
    return shrink * y_t - alpha_bar_next**0.5 * math.expm1(-h) * x_0


def time_grid(T, n, spacing='uniform'):
    """n distinct time indices from high to low, 1 <= n <= T, spaced 'uniform' or 'quadratic'."""
    if spacing == 'uniform' or n == 1:  # starts at T - 1; index 0 only if n = T
        grid = [math.floor((i + 1) * T / n + 0.5) - 1 for i in range(n)]
    else:  # denser near 0, up to 0.8 T; where rounding would merge steps, the next free index
        grid = []
        for i in range(n):
            wanted = round((i / (n - 1)) ** 2 * 0.8 * T)
            grid.append(min(max(wanted, grid[-1] + 1 if grid else 0), T - n + i))
    return grid[::-1]


class Diffusion(nn.Module):
    """The DDPM of y: training loss and samplers for any network eps_theta(y_t, t).

    eps_theta takes y_t [B, C, H, W] and time indices t [B] and returns its estimate of the noise.
    """

    def __init__(self, T=1000):
        super().__init__()
        alpha_bar = linear_schedule(T)
        self.schedule = alpha_bar.tolist()  # Python floats are float64: for the samplers
        self.register_buffer('alpha_bar', alpha_bar.float(), persistent=False)

    def loss(self, eps_theta, x_0, t, eps):
        """||eps - eps_theta(y_t, t)||^2 averaged over the batch: the reweighted DDPM term."""
        y_t = q_sample(x_0, rearrange(self.alpha_bar[t], 'b -> b 1 1 1'), eps)
        return F.mse_loss(eps_theta(y_t, t), eps)

    @torch.no_grad()
    def sample(self, eps_theta, y_T, noise, steps, sampler='ddim', spacing='quadratic', start=None,
               sigma='large', eta=0.0):
        """Run the reverse chain from y_T [B, C, H, W] and return x_0 in [-1, 1].

        `noise()` draws N(0, I) that broadcasts to y_T's shape; `steps` network calls are made, on
        times below `start` (default T: the whole chain).
        """
        y, previous = y_T, None
        grid = time_grid(start or len(self.schedule), steps, spacing)
        alpha_bars = [self.schedule[t] for t in grid] + [1.0]
        for t, alpha_bar, alpha_bar_next in zip(grid, alpha_bars, alpha_bars[1:]):
            eps = eps_theta(y, torch.full((len(y),), t, device=y.device))
            x_0 = predict_x0(y, alpha_bar, eps).clamp(-1, 1)
            if sampler == 'ddpm':
                y = ddpm_step(y, x_0, alpha_bar, alpha_bar_next, noise(), sigma)
            elif sampler == 'ddim':
                y = ddim_step(y, x_0, alpha_bar, alpha_bar_next, noise(), eta)
            else:
                y = dpmpp_step(y, x_0, alpha_bar, alpha_bar_next, previous)
            previous = x_0, alpha_bar
        return y


# ==================================================================================================
# 4. U-NET: eps_theta
#
#    The DDPM network: residual blocks at falling, then rising resolution, a skip connection for
#    every feature map on the way down, attention in the middle (and where asked for), and the time
#    t added in every block. Zero-initialised last layers make every residual branch, and the
#    output, exactly 0 at the start: training begins at the best constant guess.
# ==================================================================================================


def time_embedding(t, width):
    """Sinusoids of t: [B] -> [B, width], cosines first; t is the index 0 ... T - 1."""
    # frequencies exp(-ln(10^4) i / (width/2)), i = 0 ... width/2 - 1: from 1 down to nearly 10^-4
    i = torch.arange(width // 2, device=t.device)
    frequency = torch.exp(-math.log(1e4) / (width // 2) * i)
    angle = t[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def group_norm(channels):
    """GroupNorm with 32 groups, or fewer, so that a group has at least 4 channels."""
    # One channel a group would be instance norm, which wipes out the image's mean colour.
    groups = next(g for g in range(min(32, channels // 4), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def zero_init(layer):
    """Set all parameters of a layer to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResBlock(nn.Module):
    """Residual block that sees the embedding of t (and z): [B, c_in, H, W] -> [B, c_out, H, W]."""

    def __init__(self, c_in, c_out, c_emb, dropout, scale_shift):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, 2 * c_out if scale_shift else c_out)
        self.norm2, self.dropout = group_norm(c_out), nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.scale_shift = scale_shift

    def forward(self, h, emb):
        r = self.conv1(F.silu(self.norm1(h)))
        e = rearrange(self.emb(F.silu(emb)), 'b c -> b c 1 1')
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            r = self.norm2(r) * (1 + scale) + shift
        else:
            r = self.norm2(r + e)
        return self.skip(h) + self.conv2(self.dropout(F.silu(r)))


class Attention(nn.Module):
    """Multi-head self-attention over the pixels of [B, C, H, W]; a residual branch."""

    def __init__(self, channels, heads):
        super().__init__()
        if channels % heads:
            raise ValueError(f'{channels} channels do not divide into {heads} attention heads')
        self.heads = heads
        self.norm, self.qkv = group_norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, h):
        q, k, v = rearrange(self.qkv(self.norm(h)), 'b (qkv n d) y x -> qkv b n (y x) d',
                            qkv=3, n=self.heads)
        a = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d)) v
        return h + self.out(rearrange(a, 'b n (y x) d -> b (n d) y x', y=h.shape[2]))


class Level(nn.Module):
    """The modules of one resolution: blocks, what follows each (attention or nothing), resampling."""

    def __init__(self, blocks, attention, resample):
        super().__init__()
        self.blocks, self.attention = nn.ModuleList(blocks), nn.ModuleList(attention)
        self.resample = resample


class UNet(nn.Module):
    """eps_theta: (x [B, in_channels, size, size], t [B], z [B, z_dim]) -> [B, out_channels, ...].

    `multipliers` has one entry a level, `attention` names resolutions in pixels. With z_dim > 0 the
    network also takes z. With bf16 all but the head runs under bfloat16 autocast; the output is
    float32 in any case.
    """

    def __init__(self, in_channels, out_channels, size, channels, multipliers, blocks, attention=(),
                 heads=1, dropout=0.0, z_dim=0, bf16=False):
        super().__init__()
        if size % 2 ** (len(multipliers) - 1):
            raise ValueError(f'{len(multipliers)} levels cannot halve {size} pixels')
        self.channels, self.bf16, c_emb = channels, bf16, 4 * channels
        mlp = lambda c: nn.Sequential(nn.Linear(c, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.time_mlp = mlp(channels)
        self.z_mlp = mlp(z_dim) if z_dim else None
        block = lambda c_in, c_out: ResBlock(c_in, c_out, c_emb, dropout, z_dim > 0)
        attend = lambda c, r: Attention(c, heads) if r in attention else nn.Identity()

        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        last = len(multipliers) - 1
        c, skips = channels, [channels]  # channels of h, and of every skip stored so far
        for i, multiplier in enumerate(multipliers):
            resolution, width = size >> i, multiplier * channels
            inputs = [c] + [width] * (blocks - 1)
            halve = nn.Conv2d(width, width, 3, stride=2, padding=1) if i < last else None
            self.down.append(Level([block(c_in, width) for c_in in inputs],
                                   [attend(width, resolution) for _ in inputs], halve))
            skips += [width] * (blocks + (i < last))
            c = width
        self.middle = nn.ModuleList([block(c, c), Attention(c, heads), block(c, c)])
        for i, multiplier in reversed(list(enumerate(multipliers))):
            resolution, width = size >> i, multiplier * channels
            inputs = [h + skips.pop() for h in [c] + [width] * blocks]
            double = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1))
            self.up.append(Level([block(c_in, width) for c_in in inputs],
                                 [attend(width, resolution) for _ in inputs], double if i else None))
            c = width
        self.head_norm = group_norm(c)
        self.head = zero_init(nn.Conv2d(c, out_channels, 3, padding=1))

    def trunk(self, x, t, z):
        """All layers but the head: -> [B, channels, size, size]."""
        emb = self.time_mlp(time_embedding(t, self.channels))
        if self.z_mlp:
            emb = emb + self.z_mlp(z)
        h = self.stem(x)
        skips = [h]
        for level in self.down:
            for block, attend in zip(level.blocks, level.attention):
                h = attend(block(h, emb))
                skips.append(h)
            if level.resample:
                h = level.resample(h)
                skips.append(h)
        block1, attend, block2 = self.middle
        h = block2(attend(block1(h, emb)), emb)
        for level in self.up:
            for block, attend in zip(level.blocks, level.attention):
                h = attend(block(torch.cat([h, skips.pop()], dim=1), emb))
            if level.resample:
                h = level.resample(h)
        return h

    def forward(self, x, t, z=None):
        if self.bf16:
            with torch.autocast(x.device.type, torch.bfloat16):
                h = self.trunk(x, t, z)
        else:
            h = self.trunk(x, t, z)
        return self.head(F.silu(self.head_norm(h.float())))


# ==================================================================================================
# 5. THE TWO-STAGE MODEL: stage 2, the DDPM conditioned on the frozen VAE's draft
# ==================================================================================================


class DiffuseVAE(nn.Module):
    """Frozen VAE + U-Net + diffusion; `forward` is the loss of stage 2.

    form '1' or '2': the paper's formulations, with a VAE; 'uncond': a DDPM alone, with vae = None.
    The U-Net takes 2C channels (C without a VAE); with z_cond it is also given z.
    """

    metrics = ('loss',)

    def __init__(self, vae, unet, diffusion, form, image_shape):
        super().__init__()
        self.vae, self.unet, self.diffusion = vae, unet, diffusion
        self.form, self.image_shape = form, image_shape
        if vae:
            vae.requires_grad_(False)
        self.train()

    def train(self, mode=True):
        """As in every module, except that the frozen VAE stays in eval mode."""
        super().train(mode)
        if self.vae:
            self.vae.eval()
        return self

    def network(self, x_hat, z):
        """eps_theta(y_t, t) for a given draft x_hat in [-1, 1] and its z (both None for 'uncond')."""
        # What the network is shown is the whole difference between the formulations:
        #   Formulation 1 [y_t, x_hat] (y_t = x_t),  Formulation 2 [x_t, x_hat] with x_t = y_t + x_hat.
        def eps_theta(y_t, t):
            if self.form == 'uncond':
                return self.unet(y_t, t)
            x_t = y_t + x_hat if self.form == '2' else y_t
            return self.unet(torch.cat([x_t, x_hat], dim=1), t, z)

        return eps_theta

    def noise(self, n, generator):
        """What a training step on n images draws: eps_z, t and eps."""
        z_dim = self.vae.z_dim if self.vae else 0
        return (torch.randn(n, z_dim, generator=generator),
                torch.randint(len(self.diffusion.schedule), (n,), generator=generator),
                torch.randn(n, *self.image_shape, generator=generator))

    def forward(self, x, eps_z, t, eps):
        """The loss of a batch x [B, C, H, W] in [0, 1]: a 1-tuple, as `metrics` says."""
        x_hat = z = None
        if self.vae:
            with torch.no_grad():  # stage 2 trains the U-Net only
                z = reparameterize(*self.vae.encode(x), eps_z)  # a sample, not the mean
                x_hat = 2 * self.vae.decode(z) - 1
        return (self.diffusion.loss(self.network(x_hat, z), 2 * x - 1, t, eps),)

    @torch.no_grad()
    def generate(self, z, y_T, noise, **how):
        """Draft and refine: z [B, z_dim] (None for 'uncond'), y_T [B, C, H, W] -> two images.

        Returns (draft, refined) in [0, 1], draft None for 'uncond'; `how` goes to Diffusion.sample.
        """
        draft = self.vae.decode(z) if self.vae else None
        x_hat = 2 * draft - 1 if self.vae else None
        x_0 = self.diffusion.sample(self.network(x_hat, z), y_T, noise, **how)
        return draft, (x_0 + 1) / 2


# ==================================================================================================
# 6. SETTINGS: one table, from which the command line and its --help are made
#
#    A run's settings are, later ones winning: the defaults in `Config`, the network rows for the
#    image size, the preset, the data set, what stage 2 inherits from stage 1, the command line.
# ==================================================================================================


def ints(text):
    """'1,2,2' -> [1, 2, 2]; '' -> []."""
    return [int(part) for part in text.split(',') if part]


def widths(text):
    """'32:16,1:32' -> {32: 16, 1: 32}."""
    return {int(part.split(':')[0]): int(part.split(':')[1]) for part in text.split(',')}


def option(default, help, low=None, high=math.inf, choices=None, type=None, inherit=False):
    """A field of `Config` or `Sampling`; numbers must be finite and in [low, high]."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices,
                                                type=type, inherit=inherit))


@dataclass
class Config:
    """The settings of one training run; its checkpoint keeps them."""

    stage: int = option(1, 'what to train: 1 the VAE, 2 the diffusion model', choices=(1, 2))
    form: str = option('1', "stage 2: the paper's Formulation 1 or 2, or the unconditional baseline",
                       choices=('1', '2', 'uncond'))
    preset: str = option('small', "'small' for a CPU, or the paper's configuration for a data set",
                         choices=('small', 'cifar10', 'celeba64', 'celebahq128', 'celebahq256'),
                         inherit=True)
    data: str = option('shapes', 'shapes, mnist, fashion, cifar10, celeba, or a folder of images',
                       inherit=True)
    root: str = option('data', 'where the files of a named data set are, or are downloaded to')
    size: int = option(32, 'height and width of the images', low=8, high=1024, inherit=True)
    flip: bool = option(False, 'mirror training images at random; never for mnist and fashion')
    encoder: str = option(None, "VAE encoder, in the authors' layer shorthand", inherit=True)
    decoder: str = option(None, "VAE decoder, in the authors' layer shorthand", inherit=True)
    width: dict = option(None, 'VAE channels at each resolution, as 32:16,...,1:32; the last is '
                         'z_dim', type=widths, inherit=True)
    alpha: float = option(1.0, 'weight of the KL in stage 1', low=0, inherit=True)
    timesteps: int = option(1000, 'T, the length of the diffusion chain', low=1, high=100_000)
    channels: int = option(32, 'U-Net: channels of the first level', low=4, high=4096)
    multipliers: list = option(None, 'U-Net: channel multiplier of each level', type=ints)
    blocks: int = option(1, 'U-Net: residual blocks a level', low=1, high=100)
    attention: list = option(None, 'U-Net: resolutions in pixels with attention, beside the middle',
                             type=ints)
    heads: int = option(4, 'U-Net: attention heads', low=1, high=4096)
    dropout: float = option(0.0, 'U-Net: dropout in the residual blocks', low=0, high=0.99)
    z_cond: bool = option(False, 'stage 2: give the U-Net z itself besides x_hat')
    steps: int = option(1000, 'training steps of this stage; a larger number extends a run', low=1)
    batch: int = option(16, 'images a step', low=1)
    lr: float = option(1e-3, 'learning rate of Adam', low=0)
    warmup: int = option(1, 'steps over which the learning rate rises linearly', low=1)
    clip: float = option(0.0, 'largest norm of the gradient; 0: no clipping', low=0)
    ema: float = option(0.0, 'decay of the moving average of the weights, the ones that sample; '
                        'rises as (1+n)/(10+n); 0: no average', low=0, high=1)
    seed: int = option(0, 'seed of everything random', low=0)
    precision: str = option(None, "the U-Net's trunk; default: bfloat16 if the device declares it "
                            'fast', choices=('float32', 'bfloat16'))


# The small networks for a laptop, by image size (ours; NOTES.md says how they were chosen).
SMALL_NETWORKS = {
    32: dict(encoder='32d4,32t8,8x1,8d2,8t4,4x2,4d4,4t1,1x1',
             decoder='1x1,1u4,1t4,4x3,4u2,4t8,8x2,8u2,8t16,16x1,16u2,16t32',
             width=widths('32:16,16:32,8:64,4:128,1:32'), multipliers=[1, 2, 2]),
    64: dict(encoder='64d4,64t16,16x1,16d2,16t8,8x1,8d2,8t4,4x2,4d4,4t1,1x1',
             decoder='1x1,1u4,1t4,4x3,4u2,4t8,8x2,8u2,8t16,16x1,16u2,16t32,32x1,32u2,32t64',
             width=widths('64:16,32:32,16:64,8:64,4:128,1:64'), multipliers=[1, 1, 2, 2]),
    128: dict(encoder='128d4,128t32,32x1,32d2,32t16,16x1,16d2,16t8,8x1,8d2,8t4,4x2,4d4,4t1,1x1',
              decoder='1x1,1u4,1t4,4x3,4u2,4t8,8x2,8u2,8t16,16x1,16u2,16t32,32x1,32u4,32t128',
              width=widths('128:16,32:32,16:64,8:64,4:128,1:64'), multipliers=[1, 1, 1, 2, 2]),
}

# The presets: `both` stages, stage 1, stage 2. Sources of the paper's presets:
#   encoder, decoder, width, channels, multipliers, attention: authors' YAML; attention at 16x16 on
#     CIFAR-10: the authors' reproduction branch (their main branch attends in the middle only)
#   alpha, lr, warmup, clip, ema, flip, timesteps (Config's default): paper and authors' YAML
#   heads, dropout, batch (summed over GPUs), epochs: authors' scripts, which override the YAML
#   steps = epochs x images / batch, with CelebA's 162,770 training images, 30,000 of CelebA-HQ
# 'small' is ours: what ten minutes on two cores allow.
PAPER_STAGE1 = dict(lr=1e-4)
PAPER_STAGE2 = dict(channels=128, blocks=2, heads=8, lr=2e-4, warmup=5000, clip=1.0, ema=0.9999,
                    flip=True)
PRESETS = {
    'small': dict(
        both={},
        stage1=dict(alpha=0.1, batch=32, lr=2e-3, warmup=100, steps=3000),
        stage2=dict(flip=True, lr=1e-3, warmup=200, clip=1.0, ema=0.9999, steps=3000),
    ),
    'cifar10': dict(
        both=dict(
            data='cifar10', size=32, width=widths('32:64,16:128,8:256,4:256,1:512'),
            encoder='32x7,32d2,32t16,16x4,16d2,16t8,8x4,8d2,8t4,4x3,4d4,4t1,1x3',
            decoder='1x1,1u4,1t4,4x2,4u2,4t8,8x3,8u2,8t16,16x7,16u2,16t32,32x15'),
        stage1=dict(PAPER_STAGE1, batch=128, steps=500 * 50_000 // 128),
        stage2=dict(PAPER_STAGE2, multipliers=[1, 2, 2, 2], attention=[16], dropout=0.3, batch=256,
                    steps=2850 * 50_000 // 256),
    ),
    'celeba64': dict(
        both=dict(
            data='celeba', size=64, width=widths('64:64,32:128,16:256,8:256,4:256,1:512'),
            encoder='64x7,64d2,64t32,32x4,32d2,32t16,16x7,16d2,16t8,8x3,8d2,8t4,4x3,4d4,4t1,1x2',
            decoder='1x1,1u4,1t4,4x2,4u2,4t8,8x3,8u2,8t16,16x7,16u2,16t32,32x8,32u2,32t64,64x10'),
        stage1=dict(PAPER_STAGE1, batch=32, steps=245 * 162_770 // 32),
        stage2=dict(PAPER_STAGE2, multipliers=[1, 2, 2, 2, 4], attention=[4], dropout=0.1,
                    batch=128, steps=500 * 162_770 // 128),
    ),
    'celebahq128': dict(
        both=dict(
            size=128, width=widths('128:64,64:64,32:128,16:128,8:256,4:512,1:1024'),
            encoder='128x1,128d2,128t64,64x3,64d2,64t32,32x3,32d2,32t16,16x7,16d2,16t8,8x3,8d2,8t4,'
                    '4x3,4d4,4t1,1x2',
            decoder='1x1,1u4,1t4,4x2,4u2,4t8,8x2,8u2,8t16,16x6,16u2,16t32,32x2,32u2,32t64,64x2,'
                    '64u2,64t128,128x1'),
        stage1=dict(PAPER_STAGE1, flip=True, batch=42, steps=500 * 30_000 // 42),
        stage2=dict(PAPER_STAGE2, multipliers=[1, 2, 2, 3, 4], attention=[8], dropout=0.1, lr=2e-5,
                    batch=64, steps=1000 * 30_000 // 64),
    ),
    'celebahq256': dict(
        both=dict(
            size=256, width=widths('256:64,128:64,64:64,32:128,16:128,8:256,4:512,1:1024'),
            encoder='256x3,256d2,256t128,128x3,128d2,128t64,64x5,64d2,64t32,32x7,32d2,32t16,16x9,'
                    '16d2,16t8,8x7,8d2,8t4,4x5,4d4,4t1,1x2',
            decoder='1x2,1u4,1t4,4x4,4u2,4t8,8x6,8u2,8t16,16x8,16u2,16t32,32x5,32u2,32t64,64x4,'
                    '64u2,64t128,128x2,128u2,128t256,256x2'),
        stage1=dict(PAPER_STAGE1, flip=True, batch=16, steps=500 * 30_000 // 16),
        stage2=dict(PAPER_STAGE2, multipliers=[1, 1, 2, 2, 4, 4], attention=[16], dropout=0.1,
                    lr=2e-5, batch=64, steps=1000 * 30_000 // 64),
    ),
}


@dataclass
class Sampling:
    """How images are generated."""

    steps: int = option(25, 'network calls an image', low=1)
    sampler: str = option('ddim', 'the update rule', choices=('ddpm', 'ddim', 'dpm++'))
    spacing: str = option('quadratic', 'of the times visited', choices=('uniform', 'quadratic'))
    sigma: str = option('large', "variance of a ddpm step", choices=('large', 'small'))
    eta: float = option(0.0, 'noise of a ddim step: 0 none, 1 as ddpm with small variance', 0, 1)
    temperature: float = option(1.0, 'scale of the starting noise y_T', low=0)
    shared_noise: bool = option(False, 'all images share y_T and later noise: only z varies')
    start: int = option(None, 'truncated chain: start from noise at this t instead of T', low=1)
    seed: int = option(0, 'seed of z and all noise', low=0)


def check(settings):
    """Raise UserError for a number out of its range or not finite."""
    for f in fields(settings):
        value, low, high = getattr(settings, f.name), f.metadata['low'], f.metadata['high']
        if low is not None and value is not None and not (low <= value <= high < math.inf + value):
            limit = f'at least {low}' if high == math.inf else f'between {low} and {high}'
            raise UserError(f'--{f.name.replace("_", "-")} {value}: must be {limit}')
    return settings


def resolve(given, parent=None):
    """The `Config` of a new run from the options `given`, and of stage 2 from its stage 1's."""
    inherited = {f.name: parent[f.name] for f in fields(Config) if f.metadata['inherit'] and parent}
    for name, value in inherited.items():
        if given.get(name, value) != value:
            raise UserError(f'--{name} {given[name]} contradicts stage 1, trained with {value}')
    inherited |= {'root': parent['root']} if parent else {}
    chosen = inherited | given
    preset = PRESETS[chosen.get('preset', 'small')]
    chosen = preset['both'] | preset[f'stage{given["stage"]}'] | chosen
    if chosen.get('preset', '').startswith('celebahq') and 'data' not in chosen:
        raise UserError(f'--preset {chosen["preset"]} needs --data, the folder of its images')
    if chosen.get('data') == 'celeba':
        chosen.setdefault('size', 64)
    if chosen.get('data') in DIGITS:
        chosen['flip'] = False
    config = check(Config(**chosen))
    small = SMALL_NETWORKS.get(config.size, {})
    for name in ('encoder', 'decoder', 'width', 'multipliers'):
        if getattr(config, name) is None:
            if name not in small:
                raise UserError(f'--size {config.size}: there are small networks for '
                                f'{", ".join(map(str, SMALL_NETWORKS))}; for others give --{name}')
            setattr(config, name, small[name])
    return config


# ==================================================================================================
# 7. TRAINING: one loop for both stages
#
#    A stage is a module: `noise(n, generator)` draws what a step needs, `forward(x, *noise)`
#    returns its loss first, `metrics` names what it returns.
# ==================================================================================================

LOG_EVERY = 10  # steps averaged into one row of the CSV file


def build(config):
    """The module that `config` describes: a VAE for stage 1, a DiffuseVAE for stage 2."""
    c = 1 if config.data in DIGITS else 3
    try:
        vae = unet = None
        if config.stage == 1 or config.form != 'uncond':
            vae = VAE(c, config.size, config.encoder, config.decoder, config.width, config.alpha)
        if config.stage == 1:
            model = vae
        else:
            unet = UNet(2 * c if vae else c, c, config.size, config.channels, config.multipliers,
                        config.blocks, config.attention or (), config.heads, config.dropout,
                        vae.z_dim if config.z_cond and vae else 0, config.precision == 'bfloat16')
            model = DiffuseVAE(vae, unet, Diffusion(config.timesteps), config.form,
                               (c, config.size, config.size))
        # A step on the `meta` device computes shapes only: it finds layers that do not fit.
        x = torch.zeros(2, c, config.size, config.size)
        copy.deepcopy(model).to('meta')(*[v.to('meta') for v in (x, *model.noise(2, generator()))])
    except (ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f'these settings do not make a network: {error}') from error
    return model


def choose_device(name=None):
    """The torch.device of that name; by default CUDA if there is one, else the CPU."""
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {name}: not on this machine; cpu always is') from error
    return device


def fast_precision(device):
    """'bfloat16' where the device declares matrix units for it, else 'float32'."""
    if device.type == 'cuda':
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == 'cpu' and torch.cpu.get_capabilities().get('amx_bf16', False)
    return 'bfloat16' if fast else 'float32'


def checkpoint_path(out, stage, form):
    """OUT/stage1.pt, OUT/stage2-form1.pt, OUT/stage2-form2.pt or OUT/stage2-uncond.pt."""
    name = 'stage1' if stage == 1 else f'stage2-{"form" * (form != "uncond")}{form}'
    return Path(out) / f'{name}.pt'


def write_atomically(path, data):
    """Write bytes so that `path` holds the old content or the new, never a part."""
    beside = path.with_name(path.name + '.part')
    with open(beside, 'wb') as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load_checkpoint(path, stage, form):
    """The checkpoint of that stage and form, as a dict on the CPU."""
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
        found = saved['config']['stage'], saved['config']['form']
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f'{path}: not a checkpoint of this program ({reason[:80]})') from error
    if found[0] != stage or (stage == 2 and found[1] != form):
        raise UserError(f'{path}: holds stage {found[0]}, form {found[1]}, '
                        f'where stage {stage}, form {form} belongs')
    return saved


def ema_update(averages, parameters, step, decay):
    """Move the averages towards the parameters after step 0, 1, 2, ...: lists of tensors, in place."""
    # average <- d average + (1 - d) parameter, with d rising to `decay`: with d = 0.9999 from the
    # start, 37% of the random initialisation would still be in it after 10,000 steps.
    d = min(decay, (1 + step) / (10 + step))
    for average, parameter in zip(averages, parameters):
        average.lerp_(parameter, 1 - d)


class Progress:
    """A status line: rewritten in place on a terminal, elsewhere printed every ten seconds."""

    def __init__(self):
        self.last = -math.inf

    def __call__(self, text, final=False):
        in_place = sys.stdout.isatty()
        if final or in_place or time.monotonic() - self.last >= 10:
            print(f'\r{text}\x1b[K' if in_place else text, end='' if in_place and not final else '\n',
                  flush=True)
            self.last = time.monotonic()


def train(config, out, device, save_every, saved=None, parent=None):
    """Train one stage from the checkpoint `saved`, or from scratch; stage 2's VAE from `parent`."""
    path = checkpoint_path(out, config.stage, config.form)
    images = load_images(config.data, config.root, config.size)
    held_out = load_images(config.data, config.root, config.size, train=False)
    torch.manual_seed(config.seed)  # the initial weights
    model = build(config)
    if parent and model.vae:
        model.vae.load_state_dict(parent['model'])
    if saved:
        model.load_state_dict(saved['model'])
    model = model.to(device, memory_format=torch.channels_last)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.Adam(trained.values(), lr=config.lr)
    sums = torch.zeros(len(model.metrics), device=device)
    first = 0
    if saved:
        first, sums = saved['step'], saved['sums'].to(device)
        ema = {name: p.to(device) for name, p in saved['ema'].items()}
        optimizer.load_state_dict(saved['optimizer'])
    rows = open_csv(path.with_suffix('.csv'), ['step', *model.metrics, 'lr', 'images_per_s'], first)

    def save(step):
        buffer = io.BytesIO()
        torch.save(dict(config=asdict(config), step=step, model=model.state_dict(), ema=ema,
                        optimizer=optimizer.state_dict(), sums=sums), buffer)
        write_atomically(path, buffer.getvalue())
        averaged = copy.deepcopy(model).eval()
        averaged.load_state_dict(ema, strict=False)
        write_grid(path.with_suffix('.png'), training_picture(averaged, held_out), config.data)

    progress, start = Progress(), time.monotonic()
    last_save = last_log = start
    for step in range(first, config.steps):
        # The one rule of randomness: all that is random in this step is a function of (seed, step).
        g = generator(config.seed, 'step', step)
        torch.manual_seed(g.initial_seed())  # dropout draws from torch's global generator
        x = images.batch(batch_indices(len(images), config.batch, config.seed, step))
        flip = torch.rand(config.batch, 1, 1, 1, generator=g) < 0.5 * config.flip
        x = torch.where(flip, x.flip(3), x)
        x, *noise = [v.to(device, non_blocking=True) for v in (x, *model.noise(len(x), g))]

        for group in optimizer.param_groups:
            group['lr'] = config.lr * min(1, (step + 1) / config.warmup)
        losses = model(x, *noise)
        optimizer.zero_grad()
        losses[0].backward()
        if config.clip:
            nn.utils.clip_grad_norm_(trained.values(), config.clip)
        optimizer.step()
        with torch.no_grad():
            ema_update(ema.values(), trained.values(), step, config.ema)
            sums += torch.stack(losses)

        done, now = step + 1, time.monotonic()
        if done % LOG_EVERY == 0:
            means = (sums / LOG_EVERY).tolist()
            sums.zero_()
            if not math.isfinite(means[0]):
                raise UserError(f'the loss is not finite at step {done}: try a smaller --lr; '
                                f'{path} was last saved before', code=1)
            rate = LOG_EVERY * config.batch / (now - last_log)
            last_log = now
            rows.writerow([done, *means, optimizer.param_groups[0]['lr'], f'{rate:.1f}'])
            left = (now - start) / (done - first) * (config.steps - done)
            values = '  '.join(f'{name} {v:.4g}' for name, v in zip(model.metrics, means))
            progress(f'step {done}/{config.steps}  {values}  {rate:.0f} images/s  '
                     f'{left / 60:.1f} min left', final=done == config.steps)
        if done == config.steps or now - last_save > save_every:
            save(done)
            last_save = time.monotonic()
    print(f'{path} and its .csv are complete; look at {path.with_suffix(".png")}')


def open_csv(path, header, step):
    """Append to a CSV file after its row for `step`; what a lost run wrote later is dropped."""
    rows = list(csv.reader(path.open())) if step and path.exists() else []
    rows = [row for row in rows[1:] if int(row[0]) <= step]
    file = path.open('w', newline='', buffering=1)  # each row reaches the file at once
    writer = csv.writer(file)
    writer.writerows([header, *rows])
    return writer


# ==================================================================================================
# 8. SAMPLING: z ~ N(0, I), x_hat = decoder(z), then the reverse chain
# ==================================================================================================

CHUNK = 64  # images drawn together; the randomness of a chunk is a function of (seed, chunk)


def sample_chunk(model, sampling, chunk, n):
    """The first n images of a chunk as (drafts, refined) on the CPU, in [0, 1]; drafts may be None."""
    device = next(model.parameters()).device
    # All CHUNK images are drawn even if n < CHUNK, so that image i is the same for every --num.
    g = generator(sampling.seed, 'chunk', chunk)
    z = torch.randn(CHUNK, model.vae.z_dim, generator=g)[:n].to(device) if model.vae else None
    if sampling.shared_noise:
        g = generator(sampling.seed, 'shared noise')
    count = 1 if sampling.shared_noise else CHUNK
    noise = lambda: torch.randn(count, *model.image_shape, generator=g)[:n].to(device)
    # Temperature scales y_T; in Formulation 2 that is the noise around x_hat, not x_hat itself.
    y_T = sampling.temperature * noise().expand(n, *model.image_shape)
    draft, refined = model.generate(
        z, y_T, noise, steps=sampling.steps, sampler=sampling.sampler, spacing=sampling.spacing,
        start=sampling.start, sigma=sampling.sigma, eta=sampling.eta)
    return draft.cpu() if model.vae else None, refined.cpu()


def training_picture(model, held_out):
    """What a training run is judged by: rows of 16 images, [16, C, H, W] in [0, 1] each."""
    if isinstance(model, DiffuseVAE):  # drafts from the prior, above their refined images
        return [row for row in sample_chunk(model, Sampling(), 0, 16) if row is not None]
    device = next(model.parameters()).device
    x = held_out.batch(range(min(16, len(held_out)))).to(device)  # above their reconstructions
    with torch.no_grad():
        return [x.cpu(), model.decode(model.encode(x)[0]).cpu()]


def to_uint8(images, data):
    """[N, C, H, W] in [0, 1] -> uint8, rounded; padding removed."""
    images = images[..., 2:-2, 2:-2] if data in DIGITS else images
    return (255 * images).round().clamp(0, 255).byte()


def png(image):
    """uint8 [C, H, W] -> the bytes of a PNG file."""
    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, 'png')
    return buffer.getvalue()


def write_grid(path, rows, data):
    """Write rows of images, [n, C, H, W] in [0, 1] each, as one picture, small images enlarged."""
    images = to_uint8(torch.cat(rows), data)
    scale = max(1, 64 // images.shape[-1])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    write_atomically(path, png(make_grid(images, nrow=len(rows[0]), padding=2, pad_value=255)))


# ==================================================================================================
# 9. COMMAND LINE
# ==================================================================================================


def command_train(args, given):
    """train: start, resume or extend a stage."""
    stage, form = given['stage'], given.get('form', '1')
    data = given.get('data', PRESETS[given.get('preset', 'small')]['both'].get('data', 'shapes'))
    out = Path(args.out or f'runs/{Path(data).resolve().name if Path(data).is_dir() else data}')
    path, first = checkpoint_path(out, stage, form), checkpoint_path(out, 1, '1')
    if stage == 1 and form != '1':
        raise UserError(f'--form {form}: only stage 2 has a form')
    parent = load_checkpoint(first, 1, '1') if stage == 2 and first.exists() else None
    if stage == 2 and form != 'uncond' and not path.exists() and parent is None:
        raise UserError(f'stage 2 needs {first}: first run python diffusevae.py train --stage 1'
                        + ''.join(f' --{k} {given[k]}' for k in ('data', 'preset') if k in given)
                        + (f' --out {args.out}' if args.out else ''))
    device = choose_device(args.device)
    saved = load_checkpoint(path, stage, form) if path.exists() else None
    if saved:
        config, parent = Config(**saved['config']), None
        for name, value in given.items():
            before = getattr(config, name)
            if name == 'steps' and value < saved['step'] or (
                    name not in ('steps', 'root') and value != before):
                before = saved['step'] if name == 'steps' else before
                raise UserError(f'--{name.replace("_", "-")} {value} contradicts {path}, trained '
                                f'with {before}; choose another --out, or delete the checkpoint')
            setattr(config, name, value)
        if saved['step'] == config.steps:
            print(f'{path} is complete: {config.steps} steps; a larger --steps extends it')
            return
    else:
        config = resolve(given, parent and parent['config'])
        config.precision = config.precision or fast_precision(device)
    out.mkdir(parents=True, exist_ok=True)
    print(f'stage {stage}{f" form {form}" if stage == 2 else ""} on {config.data}, {device}, '
          f'{config.precision}, {"from step " + str(saved["step"]) if saved else "from scratch"}, '
          f'{config.steps} steps of {config.batch} images -> {path}')
    train(config, out, device, args.save_every, saved, parent)


def command_sample(args, given):
    """sample: a grid, or a folder of PNGs."""
    sampling = check(Sampling(**given))
    forms = [args.form] if args.form else ['1', '2', 'uncond']
    found = [f for f in forms if checkpoint_path(args.out, 2, f).exists()]
    if not found:
        raise UserError(f'no {checkpoint_path(args.out, 2, forms[0])}: first run '
                        f'python diffusevae.py train --stage 2 --form {forms[0]}, or name --out')
    saved = load_checkpoint(checkpoint_path(args.out, 2, found[0]), 2, found[0])
    config = Config(**saved['config'])
    if args.real:
        return export_real(args, config, sampling.seed)
    T = sampling.start or config.timesteps
    if not sampling.steps <= T <= config.timesteps:
        raise UserError(f'--steps {sampling.steps}, --start {T}: steps <= start <= '
                        f'{config.timesteps} (the T of this model) must hold')
    device = choose_device(args.device)
    model = build(config)
    model.load_state_dict(saved['model'])
    model.load_state_dict(saved['ema'], strict=False)
    model = model.eval().to(device, memory_format=torch.channels_last)
    if args.png:
        settings = asdict(sampling) | dict(checkpoint=str(args.out), form=config.form,
                                           trained_steps=saved['step'])
        names = ['drafts', 'refined'] if model.vae else ['refined']
        return export(args.png, args.num, settings, names, config.data,
                      lambda chunk, n: sample_chunk(model, sampling, chunk, n)[-len(names):])
    if args.num > CHUNK:
        raise UserError(f'--num {args.num}: a grid has at most {CHUNK} images; '
                        f'--png FOLDER writes any number')
    drafts, refined = sample_chunk(model, sampling, 0, args.num)
    blank = torch.ones(-args.num % 16 if args.num > 16 else 0, *refined.shape[1:])
    rows = []
    for i in range(0, args.num, 16):  # every draft above its refined image
        for images in (drafts, refined):
            if images is not None:
                rows.append(torch.cat([images, blank])[i:i + 16])
    path = Path(args.out) / f'samples-{checkpoint_path("", 2, config.form).stem[7:]}.png'
    write_grid(path, rows, config.data)
    print(f'{path}: {"each draft above its refined image" if model.vae else "samples"}')


def export(folder, num, settings, names, data, make):
    """Write num images as FOLDER/name/000000.png ... for each name, chunk by chunk.

    `make(chunk, n)` returns one batch for each name. Chunks whose files all exist are not made
    again; a folder that was started with other settings is refused.
    """
    folder = Path(folder)
    note = folder / 'settings.json'
    if note.exists():
        before = json.loads(note.read_text())
        for key in before.keys() | settings.keys():
            if before.get(key) != settings.get(key):
                raise UserError(f'--png {folder}: made with {key} {before.get(key)}, not '
                                f'{settings.get(key)}; choose another folder')
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(settings, indent=1).encode())
    progress, start = Progress(), time.monotonic()
    for chunk in range(math.ceil(num / CHUNK)):
        numbers = range(chunk * CHUNK, min(num, (chunk + 1) * CHUNK))
        paths = [[folder / name / f'{i:06}.png' for i in numbers] for name in names]
        if not all(path.exists() for row in paths for path in row):
            for row, images in zip(paths, make(chunk, len(numbers))):
                for path, image in zip(row, to_uint8(images, data)):
                    write_atomically(path, png(image))
        done = numbers[-1] + 1
        rate = done / (time.monotonic() - start)
        progress(f'{done}/{num} images in {folder}  {rate:.0f} images/s  '
                 f'{(num - done) / rate / 60:.1f} min left', final=done == num)


def export_real(args, config, seed):
    """sample --real --png: training images in the same layout, for FID tools."""
    images = load_images(config.data, config.root, config.size)
    if not args.png:
        raise UserError('--real writes a folder: give --png FOLDER')
    if args.num > len(images):
        raise UserError(f'--num {args.num}: there are {len(images)} training images')
    order = epoch_order(len(images), seed, 0)
    export(args.png, args.num, dict(real=config.data, seed=seed), ['real'], config.data,
           lambda chunk, n: [images.batch(order[chunk * CHUNK:][:n])])


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors: one line instead of a usage text."""

    def error(self, message):
        raise UserError(message)


def add_options(parser, settings, leave_out=()):
    """One command-line option for every field of a settings class; absent unless given."""
    for f in fields(settings):
        if f.name in leave_out:
            continue
        kind = f.metadata['type'] or f.type
        how = dict(action='store_true') if f.type is bool else dict(type=kind)
        if f.metadata['choices']:
            how['choices'] = f.metadata['choices']
        default = '' if f.default in (None, False) else f' (default {f.default})'
        parser.add_argument('--' + f.name.replace('_', '-'), default=argparse.SUPPRESS,
                            help=f.metadata['help'].replace('%', '%%') + default, **how)


def positive(text):
    """An integer of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def main(argv=None):
    """Run one command; returns the exit code: 0, or 2 for what the user can put right."""
    parser = Parser(prog='diffusevae.py', description=__doc__.split('\n')[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest='command', required=True, parser_class=Parser)
    for name, command, settings in (('train', command_train, Config),
                                    ('sample', command_sample, Sampling)):
        sub = commands.add_parser(name, help=command.__doc__, description=command.__doc__,
                                  allow_abbrev=False)
        sub.set_defaults(run=command)
        add_options(sub, settings)
        sub.add_argument('--device', help='cpu, cuda, cuda:1, mps; default: cuda if there is one')
        if name == 'train':
            sub.add_argument('--out', help='folder of the run (default runs/<data>)')
            sub.add_argument('--save-every', type=float, default=60, help='seconds (default 60)')
        else:
            sub.add_argument('--out', default='runs/shapes', help='folder of the run (default runs/shapes)')
            sub.add_argument('--form', choices=('1', '2', 'uncond'), help='default: what is there')
            sub.add_argument('--num', type=positive, default=64, help='how many (default 64)')
            sub.add_argument('--png', metavar='FOLDER', help='write single images, not a grid')
            sub.add_argument('--real', action='store_true', help='training images, with --png')
    try:
        args = parser.parse_args(argv)
        known = {f.name for f in fields(Config)} | {f.name for f in fields(Sampling)}
        args.run(args, {k: v for k, v in vars(args).items() if k in known})
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return error.code
    except OSError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
