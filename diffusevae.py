"""DiffuseVAE in one file: a VAE drafts, a diffusion model refines.

To be read beside Pandey et al., "DiffuseVAE: Efficient, Controllable and High-Fidelity Generation
from Low-Dimensional Latents", TMLR 2022, arXiv 2201.00308. Not the authors' code; see NOTES.md.

    z ~ N(0, I) ---> VAE decoder ---> x_hat, a blurry draft ---+
                                                               v  (as extra input channels)
    x_T, pure noise ---> U-Net, a few steps back in time: x_T -> ... -> x_0, a sharp image
z, here 16 numbers, fixes the layout; the diffusion model (DDPM) paints the detail that the draft
lacks, in few steps. Sections 2 to 5 are the method: tensors in, tensors out, no files.
    python diffusevae.py train --stage 1      # the VAE: runs/shapes/stage1.pt
    python diffusevae.py train --stage 2      # the DDPM on its drafts
    python diffusevae.py sample               # drafts above refined images, as a PNG
Measured on 2 AMD EPYC cores: 9 to 10 minutes; 90% of the real finest detail (drafts: 18%): NOTES 5.
"""
import argparse, ast, copy, hashlib, io, itertools, json, math, os, re, signal, sys, time, timeit
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps
from torch.distributions import MultivariateNormal, Normal, kl_divergence as kl_normal
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, utils
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor, to_pil_image
RANK, WORLD = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))  # by torchrun
class UserError(Exception):
    """What the user can put right: `main` prints it as one line and returns exit code 2."""
def generator(*key):
    """A CPU random generator that is a function of `key` alone, e.g. (seed, 'step', 17)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], 'little') >> 1)
# ==== 1. DATA =====================================================================================
#    Images are floats in [0, 1] here and in the VAE; section 5 maps them to the DDPM's [-1, 1].
#    Held-out images (a test split, 5% of a folder, another seed of shapes) never enter training.
KINDS = 'wide', 'circle', 'tall'
def draw_shapes(n, g, size=32):
    """n striped shapes: uint8 [n, 3, size, size]; their factors: kind; unscaled, in [0, 1]."""
    # A VAE can learn the factors (hues from red to blue: a whole circle would not fit a Gaussian);
    # it blurs the stripes, 5 pixels a period in one of four directions, and the DDPM restores them.
    u = torch.rand(8, n, 1, 1, generator=g)  # eight uniform numbers an image
    kind, hue, ground = (3 * u[0]).long(), 0.7 * u[1], 0.7 * u[2]
    center_x, center_y, radius = 0.435 + 0.13 * u[3], 0.435 + 0.13 * u[4], 0.27 + 0.08 * u[5]
    angle, phase = math.pi / 4 * (4 * u[6]).floor(), 2 * math.pi * u[7]
    pixel = (torch.arange(size) + 0.5) / size  # the image is the unit square
    x, y = pixel - center_x, pixel[:, None] - center_y  # [n, 1, size] and [n, size, 1]
    # Distance to the outline, negative inside, of a wide bar, a circle and a tall bar.
    bar = lambda a, b: torch.maximum(x.abs() - a * radius, y.abs() - b * radius)
    circle = (x**2 + y**2).sqrt() - 0.95 * radius
    shapes = torch.stack([bar(1.2, 0.65), circle, bar(0.65, 1.2)])  # [3, n, size, size]
    distance = shapes[kind.flatten(), torch.arange(n)]
    inside = (0.5 - size / 2 * distance).clamp(0, 1)[:, None]  # [n, 1, size, size], antialiased
    stripes = torch.sin(2 * math.pi / 5 * size * (x * angle.cos() + y * angle.sin()) + phase)
    def colour(hue, saturation, value):  # HSV to RGB, [n, 1, 1] -> [n, 3, 1, 1]
        k = (torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1) + 6 * hue[:, None]) % 6
        return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)
    shape = colour(hue, 0.75, 0.62) * (1 + 0.6 * stripes[:, None])
    image = inside * shape + (1 - inside) * colour(ground, 0.3, 0.9)
    factors = dict(kind=kind, hue=u[1], ground=u[2], x=u[3], y=u[4], size=u[5])
    return (255 * image).round().byte(), {name: f.flatten() for name, f in factors.items()}
class Images:
    """uint8 pixels [N, C, H, W], or paths, read at once if in 1 GB; `batch`: floats in [0, 1]."""
    def __init__(self, pixels, labels={}, size=None, crop=True):
        self.pixels, self.labels, self.size = pixels, labels, size
        self.fit = partial(ImageOps.fit, method=Image.LANCZOS) if crop else Image.Image.resize
        self.unreadable, self.pool = set(), ThreadPoolExecutor()  # PIL decodes in parallel
        if size and 3 * size**2 * len(pixels) <= 1e9:
            self.pixels, self.size = self.read_all(range(len(pixels))), None
    __len__ = lambda self: len(self.pixels)
    read_all = lambda self, indices: torch.stack([*self.pool.map(self.read, indices)])
    def read(self, i):
        """File i as uint8 [3, size, size]; if it is unreadable, a warning and the next one."""
        around = (k % len(self) for k in range(int(i), int(i) + len(self)))
        for k in (k for k in around if k not in self.unreadable):
            try:
                image = ImageOps.exif_transpose(Image.open(self.pixels[k]))
                if image.mode.startswith('I'):  # 16 bits: keep the upper 8, `convert` would clip
                    image = image.convert('I').point(lambda v: v / 256).convert('L')
                return pil_to_tensor(self.fit(image.convert('RGB'), (self.size, self.size)))
            except Exception as error:  # PIL's decoders raise nearly anything on a broken file
                self.unreadable.add(k)
                print(f'warning: skipped {self.pixels[k]}: {error}', file=sys.stderr)
        raise UserError(f'none of {len(self)} image files can be read, e.g. {self.pixels[0]}')
    def batch(self, indices):
        return (self.read_all(indices) if self.size else self.pixels[indices]).float() / 255
GREY = 'mnist', 'fashion'  # one channel, 28x28: padded to 32x32 here, cropped back in pictures
NAMED = dict(mnist=datasets.MNIST, fashion=datasets.FashionMNIST, cifar10=datasets.CIFAR10,
             celeba=datasets.CelebA)  # what reads a named data set below --root
def load_images(data, root='data', size=32, train=True):
    """The training or held-out `Images` of a data set's name or a folder's path, or a UserError."""
    if data == 'shapes' and size <= 64:
        return Images(*draw_shapes(20_000 if train else 2_000, generator('shapes', train), size))
    if data not in NAMED:
        # Held out are the 5% of names with the lowest hash: stable when files are added.
        kinds = '.png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm .pgm'.split()
        digest = lambda path: hashlib.sha256(path.relative_to(data).as_posix().encode()).digest()
        paths = sorted((p for p in Path(data).rglob('*') if p.suffix.lower() in kinds), key=digest)
        split = max(1, sum(digest(path)[0] < 0.05 * 256 for path in paths))
        if len(paths) <= split:
            raise UserError(f'--data {data}: not shapes (to 64x64), {", ".join(NAMED)} or images')
        return Images(paths[split:] if train else paths[:split], size=size)
    dataset = NAMED[data]
    folder = getattr(dataset, 'base_folder', f'{dataset.__name__}/raw')
    split = dict(split='train' if train else 'test') if data == 'celeba' else dict(train=train)
    try:
        found = dataset(root, download=True, **split)
    except Exception as error:  # of the network, or of damaged files
        raise UserError(f'--data {data}: not in {root}/{folder}; no download: {error}') from error
    if data == 'celeba':  # the authors squeeze 178x218 straight to a square, without a crop
        labels = {name: found.attr[:, i] for i, name in enumerate(found.attr_names) if name}
        paths = [f'{root}/celeba/img_align_celeba/{name}' for name in found.filename]
        return Images(paths, labels, size, crop=False)
    if size != 32:
        raise UserError(f'--size {size}: the images of --data {data} are 32x32')
    labels = {'digit' if data == 'mnist' else 'class': torch.as_tensor(found.targets)}
    if data in GREY:
        return Images(F.pad(found.data[:, None], (2, 2, 2, 2)), labels)  # [N, 1, 32, 32]
    return Images(rearrange(torch.from_numpy(found.data), 'n y x c -> n c y x'), labels)
# ==== 2. VAE: the generator of drafts =============================================================
#    Prior p(z) = N(0, I), encoder q(z|x) = N(mu(x), diag sigma^2(x)), decoder mean x_hat(z).
#    Stage 1 maximises the first line of the bound on which the method rests, stage 2 the second:
#    log p(x, y) >= E_q(z|x)[ log p(y|z) ] - KL( q(z|x) || p(z) )      y = signal(x), usually x
#              + E_q(z|x) E_q(x_1:T|x_0,x_hat)[ log p(x_0:T|x_hat) - log q(x_1:T|x_0,x_hat) ]
def reparameterize(mu, logvar, eps):
    """z ~ N(mu, sigma^2), differentiable in mu and logvar = log sigma^2; all are [B, z_dim]."""
    # z = mu + sigma * eps,  sigma = exp(logvar / 2),  eps ~ N(0, I)
    # The randomness sits in eps, which has no parameters; so dz/dmu = 1 and dz/dsigma = eps exist,
    # and the expectation over q(z|x) can be differentiated through its samples.
    return mu + torch.exp(logvar / 2) * eps
def kl_divergence(mu, logvar):
    """KL( N(mu, sigma^2) || N(0, I) ) of each example in nats: [B, z_dim] -> [B]."""
    # KL = 1/2 sum_j (mu_j^2 + sigma_j^2 - 1 - log sigma_j^2)
    # E_q[log q - log p] needs only E_q[z^2] = mu^2 + sigma^2 and E_q[(z - mu)^2 / sigma^2] = 1.
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(dim=1)
def negative_elbo(x, x_hat, mu, logvar, alpha=1.0):
    """Loss of stage 1, mean over the batch: (loss, squared error, KL); x, x_hat [B, C, H, W]."""
    # loss = ||x - x_hat||^2 + alpha KL( q(z|x) || p(z) ), both summed over dimensions.
    # A Gaussian decoder N(x_hat, sigma_x^2 I) has -log p(x|z) = ||x - x_hat||^2 / (2 sigma_x^2)
    # + const. Times alpha := 2 sigma_x^2, its negative ELBO is this loss: alpha = 1 is the exact
    # bound for sigma_x^2 = 1/2, a smaller alpha that of a decoder with less variance.
    squared_error = (x - x_hat).square().sum(dim=(1, 2, 3)).mean()
    kl = kl_divergence(mu, logvar).mean()
    return squared_error + alpha * kl, squared_error, kl
class VAEBlock(nn.Module):
    """Residual bottleneck without normalisation: [B, width, R, R] -> the same shape."""
    def __init__(self, width, resolution):
        super().__init__()
        k, middle = 3 if resolution > 1 else 1, width // 2
        shapes = (width, middle, 1), (middle, middle, k), (middle, middle, k), (middle, width, 1)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, k, padding=k // 2) for a, b, k in shapes)
        for conv in self.convs:
            nn.init.zeros_(conv.bias)
    def forward(self, h):
        r = h
        for conv in self.convs:
            r = conv(F.gelu(r))
        return h + r
def backbone(blocks, width):
    """Residual blocks at falling or rising resolutions, {32: 7, 16: 4, ...}; width[R]: channels."""
    # Between resolutions, down: one block more, then average pooling; up: nearest upsampling; then
    # a bias-free 1x1 convolution to the next width. NOTES 1 has the authors' shorthand for this.
    modules, resolutions = [], [*blocks]
    for r, r_next in zip(resolutions, [*resolutions[1:], resolutions[-1]]):
        modules += [VAEBlock(width[r], r) for _ in range(blocks[r] + (r_next < r))]
        if r_next != r:
            resize = nn.AvgPool2d(r // r_next) if r_next < r else nn.Upsample(None, r_next // r)
            modules += [resize, nn.Conv2d(width[r], width[r_next], 1, bias=False)]
    return nn.Sequential(*modules)
SIGNALS = dict(  # y, what the VAE models of x [B, C, H, W], in the same shape; usually x itself
    image=lambda x: x, grey=lambda x: x.mean(dim=1, keepdim=True).expand_as(x),
    lowres=lambda x: F.interpolate(F.avg_pool2d(x, 4), scale_factor=4),
    masked=lambda x: x - F.pad(F.pad(x, [-(x.shape[3] // 4)] * 4), [x.shape[3] // 4] * 4))
class VAE(nn.Module):
    """The paper's VAE for images [B, C, size, size] in [0, 1]; `forward` is the loss of stage 1.
    `encoder`, `decoder`: blocks for `backbone`, down to 1x1 and back up; z_dim is width[1]."""
    metrics = 'loss', 'squared_error', 'kl'
    def __init__(self, C, size, encoder, decoder, width, alpha=1.0, signal='image'):
        super().__init__()
        self.z_dim, self.alpha, self.signal = width[1], alpha, SIGNALS[signal]
        self.stem = nn.Conv2d(C, width[size], 3, padding=1, bias=False)
        self.encoder = backbone(encoder, width)
        self.mu, self.logvar = [nn.Conv2d(width[1], self.z_dim, 1, bias=False) for _ in range(2)]
        self.decoder = backbone(decoder, width)
        self.head = nn.Conv2d(width[size], C, 3, padding=1)
    def encode(self, x):
        """q(z|x): [B, C, H, W] -> mu and logvar, each [B, z_dim]. Of x it sees y = signal(x)."""
        h = self.encoder(self.stem(self.signal(x)))  # [B, z_dim, 1, 1]
        return self.mu(h).flatten(1), self.logvar(h).flatten(1)
    def decode(self, z):
        """The draft x_hat, the mean of p(y|z): [B, z_dim] -> [B, C, H, W] in [0, 1]."""
        return torch.sigmoid(self.head(self.decoder(rearrange(z, 'b z -> b z 1 1'))))
    def noise(self, n, g):
        """What a training step on n images draws: eps [n, z_dim]."""
        return (torch.randn(n, self.z_dim, generator=g),)
    def forward(self, x, eps):
        mu, logvar = self.encode(x)
        x_hat = self.decode(reparameterize(mu, logvar, eps))
        return negative_elbo(self.signal(x), x_hat, mu, logvar, self.alpha)
# ==== 3. DIFFUSION: one implementation for Formulations 1 and 2 and the baseline ==================
#    Formulation 1:  q(x_t|x_0)        = N(sqrt(alpha_bar_t) x_0,         (1 - alpha_bar_t) I)
#    Formulation 2:  q(x_t|x_0, x_hat) = N(sqrt(alpha_bar_t) x_0 + x_hat, (1 - alpha_bar_t) I)
#    Change of variables: with y_0 := x_0 and y_t := x_t - x_hat for t >= 1, every formula of
#    Formulation 2 becomes Formulation 1's, the last step included. (In Formulation 1 and the
#    baseline y_t := x_t.) So this section knows only y_t, and section 5 what the network is shown.
#    alpha_bar is of time t, alpha_bar_next of a grid's next smaller time (1 after the last step):
#    numbers; for q_... and predict_x0 also [B, 1, 1, 1]. In code t = 0 ... T - 1 is 1 ... T.
def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    """alpha_bar_t = prod_{s <= t} (1 - beta_s) for beta linear in t: [T], float64."""
    # In float32 1 - alpha_bar_1 = 10^-4 has three digits: enough to train, not for the samplers.
    return torch.cumprod(1 - torch.linspace(beta_1, beta_T, T, dtype=torch.float64), dim=0)
def q_sample(y_0, alpha_bar, eps):
    """Noise y_0 [B, C, H, W] to time t at once; alpha_bar is a number or [B, 1, 1, 1]."""
    # q(y_t|y_0) = N(sqrt(alpha_bar) y_0, (1 - alpha_bar) I): the steps y <- sqrt(1 - beta) y
    # + sqrt(beta) noise shrink y_0 by sqrt(alpha_bar) in all, and a sum of Gaussians is Gaussian.
    return alpha_bar**0.5 * y_0 + (1 - alpha_bar) ** 0.5 * eps
def predict_x0(y_t, alpha_bar, eps):
    """The clean image that y_t and its noise imply: `q_sample` solved for y_0 = x_0."""
    # x_0 = (y_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)
    # It multiplies errors of eps, by 157 at t = T: hence the clip, and a last layer in float32.
    return (y_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
def q_posterior(x_0, y_t, alpha_bar, alpha_bar_next):
    """Mean and variance of q(y_next|y_t, x_0), the step back if x_0 were known."""
    # Bayes' rule with the Gaussians q(y_next|x_0) and q(y_t|y_next) = N(sqrt(1-beta) y_next, beta).
    # On the full grid beta is beta_t, on a coarser one the noise between the two grid points.
    #   mean     = sqrt(alpha_bar_next) beta / (1 - alpha_bar) x_0
    #            + sqrt(1 - beta) (1 - alpha_bar_next) / (1 - alpha_bar) y_t
    #   variance = beta (1 - alpha_bar_next) / (1 - alpha_bar)
    beta = 1 - alpha_bar / alpha_bar_next
    c_0 = alpha_bar_next**0.5 * beta / (1 - alpha_bar)
    c_t = (1 - beta) ** 0.5 * (1 - alpha_bar_next) / (1 - alpha_bar)
    return c_0 * x_0 + c_t * y_t, beta * (1 - alpha_bar_next) / (1 - alpha_bar)
def ddpm_step(y_t, x_0, alpha_bar, alpha_bar_next, noise, sigma='large'):
    """Ancestral step: a draw from the posterior with the predicted x_0; no noise at the end."""
    # sigma^2: "small" is the posterior's variance, exact if x_0 could be one image only;
    # "large" is beta, exact if x_0 were white noise of variance 1. The data are in between.
    mean, variance = q_posterior(x_0, y_t, alpha_bar, alpha_bar_next)
    if sigma == 'large':
        variance = 1 - alpha_bar / alpha_bar_next
    return mean if alpha_bar_next == 1 else mean + variance**0.5 * noise
def ddim_step(y_t, x_0, alpha_bar, alpha_bar_next, noise, eta=0.0):
    """DDIM step; sigma is eta times `q_posterior`'s: 0 deterministic, 1 ancestral ("small")."""
    # y_next = sqrt(alpha_bar_next) x_0 + sqrt(1 - alpha_bar_next - sigma^2) eps + sigma noise
    # has the marginal q(y_next|x_0) whatever sigma is. eps is what y_t and the clipped x_0 imply,
    # not the network's own: with that, y_next would not be a noisy version of this x_0.
    eps = (y_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5
    sigma = eta * q_posterior(x_0, y_t, alpha_bar, alpha_bar_next)[1] ** 0.5
    direction = (1 - alpha_bar_next - sigma**2) ** 0.5 * eps
    return alpha_bar_next**0.5 * x_0 + direction + sigma * noise
def dpmpp_step(y_t, x_0, alpha_bar, alpha_bar_next, previous):
    """DPM-Solver++(2M) step (arXiv 2211.01095); previous = (x_0, alpha_bar) one step earlier."""
    # In lambda = log sqrt(alpha_bar / (1 - alpha_bar)) DDIM's ODE is solved exactly but for an
    # integral of x_0: two values give it to second order, the first step has one. Last: x_0.
    if alpha_bar_next == 1:
        return x_0
    lam = lambda a: 0.5 * math.log(a / (1 - a))
    h = lam(alpha_bar_next) - lam(alpha_bar)
    if previous:
        x_0_before, alpha_bar_before = previous
        x_0 = x_0 + (x_0 - x_0_before) * h / (2 * (lam(alpha_bar) - lam(alpha_bar_before)))
    shrink = ((1 - alpha_bar_next) / (1 - alpha_bar)) ** 0.5
    return shrink * y_t - alpha_bar_next**0.5 * math.expm1(-h) * x_0
def time_grid(T, n, spacing='uniform'):
    """n distinct times from high to low, 1 <= n <= T; 'quadratic' ones crowd near 0."""
    if spacing == 'uniform' or n == 1:  # from T - 1 down to T/n - 1
        return [math.floor(i * T / n + 0.5) - 1 for i in range(n, 0, -1)]
    grid = [0]  # from 0.8 T down to 0; where rounding would merge two times, the next free one
    for i in range(1, n):
        wanted = round((i / (n - 1)) ** 2 * 0.8 * T)
        grid.append(min(max(wanted, grid[-1] + 1), T - n + i))
    return grid[::-1]
def ddpm_loss(eps_theta, x_0, alpha_bar, t, eps):
    """||eps - eps_theta(y_t, t)||^2, mean over batch and pixels; alpha_bar [T], t [B]."""
    # The chain's KL terms compare Gaussians of one variance: squared errors of eps times weights
    # w_t. The reweighted DDPM term sets w_t = 1. y_t ~ q(y_t|x_0), each image at its own t.
    y_t = q_sample(x_0, rearrange(alpha_bar[t], 'b -> b 1 1 1'), eps)
    return F.mse_loss(eps_theta(y_t, t), eps)
class Diffusion(nn.Module):
    """DDPM of y: the schedule, and samplers for any network eps_theta(y_t [B, C, H, W], t [B])."""
    def __init__(self, T=1000):
        super().__init__()
        alpha_bar = linear_schedule(T)
        self.schedule = alpha_bar.tolist()  # for the samplers: Python floats are float64
        self.register_buffer('alpha_bar', alpha_bar.float(), persistent=False)
    @torch.no_grad()
    def sample(self, eps_theta, y_T, noise, steps, sampler='ddpm', spacing='quadratic', start=None,
               sigma='small', eta=0.0):
        """The reverse chain, from y_T [B, C, H, W] to x_0 in [-1, 1] in `steps` network calls.
        noise() draws N(0, I) that broadcasts to y_T's shape; start < T truncates the chain."""
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
# ==== 4. U-NET: eps_theta =========================================================================
#    Residual blocks at falling, then rising resolution; every feature map of the way down is
#    concatenated on the way up; attention in the middle and where asked for; t in every block.
#    The last layer of each branch, and of the network, starts at zero: the first output is 0.
def time_embedding(t, width):
    """Sinusoids of t: [B] -> float32 [B, width] on t's device, cosines first."""
    # cos(w_i t), sin(w_i t) with w_i = exp(-ln(10^4) i / (width/2)), i = 0 ... width/2 - 1
    i = torch.arange(width // 2, device=t.device)
    angle = t[:, None] * torch.exp(-math.log(1e4) / (width // 2) * i)  # [B, width/2]
    return torch.cat([angle.cos(), angle.sin()], dim=1)
def zero_init(conv):
    """The same convolution with all parameters zero."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv
class ResBlock(nn.Module):
    """Residual block that sees the embedding of t (and z): [B, c_in, H, W] -> [B, c_out, H, W]."""
    def __init__(self, c_in, c_out, c_emb, groups=1, dropout=0.0, scale_shift=False):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.scale_shift = scale_shift
        self.emb = nn.Linear(c_emb, 2 * c_out if scale_shift else c_out)
        self.norm2, self.dropout = nn.GroupNorm(groups, c_out), nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
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
    """Residual multi-head self-attention over the pixels of [B, C, H, W]."""
    def __init__(self, channels, heads, groups=1):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))
    def forward(self, h):
        q, k, v = rearrange(self.qkv(self.norm(h)), 'b (qkv heads d) y x -> qkv b heads (y x) d',
                            qkv=3, heads=self.heads)
        a = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d)) v
        return h + self.out(rearrange(a, 'b heads (y x) d -> b (heads d) y x', y=h.shape[2]))
class UNet(nn.Module):
    """eps_theta: x [B, in_channels, size, size], t [B], z [B, z_dim] -> [B, out_channels, ...].
    `attention` names resolutions; z_dim = 0: no z. bf16: in bfloat16 but for the float32 head."""
    def __init__(self, in_channels, out_channels, size, channels, multipliers, blocks, attention=(),
                 heads=1, dropout=0.0, z_dim=0, bf16=False):
        super().__init__()
        last = len(multipliers) - 1
        if (size % 2**last or not {*attention} <= {size >> i for i in range(last + 1)}
                or any(m * channels % heads for m in multipliers)):
            raise ValueError(f'{last + 1} levels do not fit {size=}, {attention=} or {heads=}')
        self.channels, self.bf16, c_emb = channels, bf16, 4 * channels
        mlp = lambda c: nn.Sequential(nn.Linear(c, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        # GroupNorm takes away each group's mean, with few channels in a group the image's mean
        # colour: so the paper's 32 groups from its 128 channels on, a single group below.
        groups = 32 if channels >= 128 else 1
        block = lambda c_in, c_out: ResBlock(c_in, c_out, c_emb, groups, dropout, z_dim > 0)
        attend = lambda c, r: Attention(c, heads, groups) if r in attention else nn.Identity()
        self.time_mlp, self.z_mlp = mlp(channels), mlp(z_dim) if z_dim else None
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips = channels, [channels]  # channels of h, and of each feature map stored so far
        for i, width in enumerate(m * channels for m in multipliers):
            inputs = [c] + [width] * (blocks - 1)
            level = [[block(c_in, width), attend(width, size >> i)] for c_in in inputs]
            if i < last:
                level += [[nn.Conv2d(width, width, 3, stride=2, padding=1)]]
            self.down += map(nn.ModuleList, level)
            skips += [width] * len(level)
            c = width
        self.middle = nn.ModuleList([block(c, c), Attention(c, heads, groups), block(c, c)])
        for i, width in reversed([*enumerate(m * channels for m in multipliers)]):
            inputs = [c_h + skips.pop() for c_h in [c] + [width] * blocks]
            level = [[block(c_in, width), attend(width, size >> i)] for c_in in inputs]
            if i > 0:
                level[-1] += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)]
            self.up += map(nn.ModuleList, level)
            c = width
        self.head_norm = nn.GroupNorm(groups, c)
        self.head = zero_init(nn.Conv2d(c, out_channels, 3, padding=1))
    def forward(self, x, t, z=None):
        device = 'cpu' if x.is_meta else x.device.type  # autocast does not know the meta device
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            emb = self.time_mlp(time_embedding(t, self.channels))
            if self.z_mlp:
                emb = emb + self.z_mlp(z)
            h = self.stem(x)
            skips = [h]
            for first, *attend in self.down:  # a block and its attention, or a halving convolution
                h = attend[0](first(h, emb)) if attend else first(h)
                skips.append(h)
            block1, attend, block2 = self.middle
            h = block2(attend(block1(h, emb)), emb)
            for block, *others in self.up:  # a block with its attention, some with a doubling too
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
                for layer in others:
                    h = layer(h)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # exact: see predict_x0
            return self.head(F.silu(self.head_norm(h.float())))
# ==== 5. THE TWO-STAGE MODEL: the DDPM conditioned on the drafts of the frozen VAE ================
def network_input(y_t, x_hat, form):
    """What eps_theta is shown of y_t and x_hat = 2 draft - 1, both [B, C, H, W]: [B, 2C, H, W]."""
    # All that tells the formulations apart: both are shown [x_t, x_hat], but x_t = y_t in
    # Formulation 1 (form == '1') and x_t = y_t + x_hat in Formulation 2 (form == '2').
    x_t = y_t if form == '1' else y_t + x_hat
    return torch.cat([x_t, x_hat], dim=1)
class DiffuseVAE(nn.Module):
    """Frozen VAE, U-Net (2C channels in, and z if built for it); `forward` is the loss of stage 2.
    Form 'uncond' is a DDPM alone: vae = None and C channels in. image_shape = (C, H, W)."""
    metrics = ('loss',)
    def __init__(self, vae, unet, diffusion, form, image_shape, cond_drop=0.0):
        super().__init__()
        self.z_dim = vae.z_dim if vae else 0
        self.vae = vae.requires_grad_(False).eval() if vae else None
        self.unet, self.diffusion, self.form = unet, diffusion, form
        self.image_shape, self.cond_drop = image_shape, cond_drop
    device = property(lambda self: self.diffusion.alpha_bar.device)
    def train(self, mode=True):
        """As for every module, except that the frozen VAE stays in eval mode."""
        self.training = self.unet.train(mode).training
        return self
    def eps_theta(self, y_t, t, x_hat, z):
        """The network's noise in y_t, given the draft x_hat in [-1, 1] and its z: [B, C, H, W]."""
        if self.form == 'uncond':
            return self.unet(y_t, t)
        return self.unet(network_input(y_t, x_hat, self.form), t, z)
    def noise(self, n, g):
        """What a training step on n images draws: eps_z, t, eps, and keep (0: without draft)."""
        # Stratified: t of image i is uniform in [i, i + 1) T / n, hence, as images are drawn at
        # random, in [0, T). The loss falls 500-fold from t = 0 to T - 1: so batches are alike.
        T = len(self.diffusion.schedule)
        t = (torch.arange(n) + torch.rand(n, generator=g)) * T / n
        return (torch.randn(n, self.z_dim, generator=g), t.long().clamp(max=T - 1),
                torch.randn(n, *self.image_shape, generator=g),
                (torch.rand(n, generator=g) >= self.cond_drop).float())
    def forward(self, x, eps_z, t, eps, keep):
        x_hat = z = None
        if self.vae:
            with torch.no_grad():  # z is a sample of q(z|x), not its mean, and new in every step
                z = reparameterize(*self.vae.encode(x), eps_z)
                x_hat = (2 * self.vae.decode(z) - 1) * rearrange(keep, 'b -> b 1 1 1')
                z = z * rearrange(keep, 'b -> b 1')
        eps_theta = partial(self.eps_theta, x_hat=x_hat, z=z)
        return (ddpm_loss(eps_theta, 2 * x - 1, self.diffusion.alpha_bar, t, eps),)
    def refine(self, draft, z, y_T, noise, guidance=0.0, **how):
        """The image in [0, 1] for a draft in [0, 1] (None for 'uncond') and its z.
        `how` goes to Diffusion.sample; guidance W > 0 needs a model trained with cond_drop."""
        x_hat = None if draft is None else 2 * draft - 1
        def eps_theta(y_t, t):
            # Classifier-free guidance: eps = (1 + W) eps(condition) - W eps(null), away from what
            # the network would do without one. Null is x_hat = 0 and z = 0 in both forms.
            eps = self.eps_theta(y_t, t, x_hat, z)
            if guidance:
                null = self.eps_theta(y_t, t, 0 * x_hat, 0 * z)
                eps = (1 + guidance) * eps - guidance * null
            return eps
        return (self.diffusion.sample(eps_theta, y_T, noise, **how) + 1) / 2
# ==== 6. SETTINGS: tables of options; `main` finds a command's by its parameter's annotation ======
#    Later ones win: defaults, preset, stage 1, the run so far; the command line where still free.
FORMS = {'1': 'form1', '2': 'form2', 'uncond': 'uncond'}  # --form, and its name in files
EVALUATED = ('ddpm', 'quadratic'), ('ddim', 'quadratic'), ('ddim', 'uniform')  # by `evaluate`
DRAWING = 'sample reconstruct interpolate edit robust'  # commands that take --sampler, --spacing
def ints(text):
    """'1,2,2' -> (1, 2, 2)."""
    return tuple(int(n) for n in text.split(',') if n)
def pairs(text):
    """'32:16,1:32' -> {32: 16, 1: 32}."""
    return dict(ints(pair.replace(':', ',')) for pair in text.split(','))
DDPM = dict(clip=1.0, ema=0.9999, flip=True)
def paper(data, size, width, encoder, decoder, multipliers, attention, images, vae, ddpm,
          dropout=0.1, lr=2e-4, flip=False):
    """A preset of the paper: settings of both stages, stage 1, 2. vae, ddpm: epochs and batch."""
    both = dict(data=data, size=size, width=pairs(width), encoder=pairs(encoder),
                decoder=pairs(decoder))
    unet = dict(channels=128, multipliers=multipliers, blocks=2, attention=attention, heads=8)
    vae, ddpm = [dict(batch=b, steps=epochs * images // b) for epochs, b in (vae, ddpm)]
    return (both, dict(lr=1e-4, warmup=1, flip=flip) | vae,
            DDPM | unet | dict(dropout=dropout, lr=lr, warmup=5000) | ddpm)
PRESETS = {  # 'small' is ours; where the others' figures come from: NOTES.md
    'small': (dict(data='shapes'),
              dict(alpha=0.1, clip=100.0, ema=0.9999, batch=64, steps=1500), DDPM),
    'cifar10': paper(
        'cifar10', 32, '32:64,16:128,8:256,4:256,1:512', '32:7,16:4,8:4,4:3,1:3',
        '1:1,4:2,8:3,16:7,32:15', (1, 2, 2, 2), (16,), 50_000, (500, 128), (2850, 256), 0.3),
    'celeba64': paper(
        'celeba', 64, '64:64,32:128,16:256,8:256,4:256,1:512', '64:7,32:4,16:7,8:3,4:3,1:2',
        '1:1,4:2,8:3,16:7,32:8,64:10', (1, 2, 2, 2, 4), (4,), 162_770, (245, 32), (500, 128)),
    'celebahq128': paper(
        'celebahq', 128, '128:64,64:64,32:128,16:128,8:256,4:512,1:1024',
        '128:1,64:3,32:3,16:7,8:3,4:3,1:2', '1:1,4:2,8:2,16:6,32:2,64:2,128:1',
        (1, 2, 2, 3, 4), (8,), 30_000, (500, 42), (1000, 64), lr=2e-5, flip=True),
    'celebahq256': paper(
        'celebahq', 256, '256:64,128:64,64:64,32:128,16:128,8:256,4:512,1:1024',
        '256:3,128:3,64:5,32:7,16:9,8:7,4:5,1:2', '1:2,4:4,8:6,16:8,32:5,64:4,128:2,256:2',
        (1, 1, 2, 2, 4, 4), (16,), 30_000, (500, 16), (1000, 64), lr=2e-5, flip=True)}
def option(default, help, low=None, high=1e15, choices=None, kind='fixed', only=None):
    """A setting: 'fixed' in a run or set of images, 'passed' on to stage 2, or 'free' to change."""
    return field(default=default, metadata=dict(locals()))
@dataclass
class Config:
    """All settings of a training run, kept in its checkpoint. A type is what parses the text."""
    stage: int = option(None, '1 trains the VAE, 2 the diffusion model', choices=(1, 2))
    form: str = option('1', 'formulation of stage 2, or the baseline', choices=FORMS)
    preset: str = option('small', 'ours, or one of the paper', choices=PRESETS, kind='passed')
    data: str = option('shapes', 'shapes, mnist, fashion, cifar10, celeba, a folder', kind='passed')
    root: str = option('data', 'where the files of a named data set are, or go', kind='free')
    out: str = option(None, 'folder of the run; default runs/<data>', kind='free')
    size: int = option(32, 'height and width of images; 64 for celeba', 16, 4096, kind='passed')
    flip: bool = option(False, 'mirror training images at random; never mnist and fashion')
    encoder: pairs = option(None, 'VAE: blocks by resolution, 32:0,8:1,...,1:1', kind='passed')
    decoder: pairs = option(None, 'VAE: the same back up, 1:1,...,32:0', kind='passed')
    width: pairs = option(None, 'VAE: channels by resolution, 32:16,...,1:16', kind='passed')
    alpha: float = option(1.0, 'VAE: weight of the KL', 0, 1e9, kind='passed')
    signal: str = option('image', 'what the VAE models of it', choices=SIGNALS, kind='passed')
    timesteps: int = option(1000, 'diffusion: T; below 500 y_T is not yet noise', 100, 10_000)
    channels: int = option(24, 'U-Net: channels of the first level', 4, 65536)
    multipliers: ints = option((1, 2), 'U-Net: channel multiplier of each level')
    blocks: int = option(1, 'U-Net: residual blocks a level', 1, 100)
    attention: ints = option((), 'U-Net: resolutions with attention, beside the middle')
    heads: int = option(4, 'U-Net: attention heads', 1, 65536)
    dropout: float = option(0.0, 'U-Net: dropout in its blocks', 0, 0.99)
    z_cond: bool = option(False, 'U-Net: takes z itself besides the draft')
    cond_drop: float = option(0.0, 'share of images trained without draft, for guidance', 0, 0.99)
    precision: str = option(None, 'of the U-Net; default: fast', choices=('float32', 'bfloat16'))
    steps: int = option(2000, 'training steps; a larger number extends a run', 1, kind='free')
    batch: int = option(32, 'images a step', 1, 1_000_000)
    lr: float = option(2e-3, "Adam's learning rate", 0, 1)
    warmup: int = option(100, 'steps of linear warm-up of the learning rate', 1)
    clip: float = option(math.inf, 'largest norm of the gradient', 0, math.inf)
    ema: float = option(0.0, 'decay of the averaged weights; rises to it as (1+n)/(10+n)', 0, 1)
    seed: int = option(0, 'seed of weights, batches and noise', 0)
    device: str = option(None, 'cpu, cuda, cuda:1, mps; default: cuda if there is one', kind='free')
    save_every: float = option(60.0, 'seconds between checkpoints', 0, kind='free')
@dataclass
class Sampling:
    """All settings of `sample` and the experiments: how images are generated."""
    out: str = option('runs/shapes', 'folder of the run', kind='free')
    form: str = option(None, 'which model; default: the first found', choices=FORMS, kind='free')
    num: int = option(None, 'images: 64; evaluate 500 or 200; pictures 8 or 9', 1, kind='free')
    steps: int = option(50, 'steps, each a network call (two if guided)', 1, only=DRAWING)
    sampler: str = option('ddpm', 'update rule', choices=('ddpm', 'ddim', 'dpm++'), only=DRAWING)
    sigma: str = option('small', 'variance of a ddpm step', choices=('large', 'small'))
    eta: float = option(0.0, 'noise of a ddim step; 1: as ddpm with small sigma', 0, 1)
    spacing: str = option('quadratic', 'of times', choices=('uniform', 'quadratic'), only=DRAWING)
    temperature: float = option(1.0, 'scale of the starting noise y_T, not of x_hat', 0, 1e3)
    shared_noise: bool = option(False, 'one noise sequence for all images', only='sample evaluate')
    start: int = option(None, 'truncated chain: as if T were this', 1)
    guidance: float = option(0.0, 'weight W, for models trained with --cond-drop', 0, 100)
    gmm: int = option(None, 'Ex-PDE: z from a mixture of K Gaussians', 1, only='sample evaluate')
    seed: int = option(0, 'seed of z and noise', 0)
    png: str = option(None, 'folder for single images, not a grid', kind='free', only='sample')
    real: bool = option(False, 'with --png: training images', kind='free', only='sample')
    device: str = option(None, 'as for train', kind='free')
    calls: ints = option((5, 10, 25), 'network calls an image', kind='free', only='evaluate')
    seeds: int = option(2, 'number of seeds, from --seed on', 2, 1000, kind='free', only='evaluate')
    bits: bool = option(False, 'the bound on -log2 p(x) instead', kind='free', only='evaluate')
    json: str = option(None, 'file; default OUT/evaluate.json', kind='free', only='evaluate')
    path: str = option('slerp', 'of z', choices=('slerp', 'linear'), only='interpolate')
    attribute: str = option(None, 'kind=circle, size>0.5, digit=3, Smiling', only='edit')
@dataclass
class Other:
    """All settings of `bench` and `exercise`."""
    device: str = option(None, 'as for train', only='bench')
    tflops: float = option(50.0, 'TFLOP/s sustained, to project', 1e-6, 1e6, only='bench')
    out: str = option('student.py', 'file to write', only='exercise')
    only: ints = option((), 'exercises to blank, 1,2,5; default: all', only='exercise')
    list: bool = option(False, 'print the exercises and their points instead', only='exercise')
def resolve(given, before, path):
    """The `Config` for options `given` and settings of a checkpoint: resumed, stage 1's, or {}."""
    resume = before.get('stage') == given['stage']
    kept = {f.name: before[f.name] for f in fields(Config) if f.name in before and
            (f.metadata['kind'] == 'passed' or resume and f.metadata['kind'] == 'fixed')}
    for name, value in kept.items():
        if given.get(name, value) != value:
            raise UserError(f'--{name.replace("_", "-")} {given[name]}: {path} has {value}')
    both, *stages = PRESETS[(kept | given).get('preset', 'small')]
    fresh = both | stages[given['stage'] - 1] | {'root': before.get('root', 'data')} | kept
    settings = (before if resume else fresh) | given
    size = settings.setdefault('size', 64 if settings['data'] == 'celeba' else 32)
    networks = dict(  # the VAE of ours, where no preset says, for sizes that are multiples of 16
        width={size: 16, 16: 32, 8: 64, 4: 128, 1: size**2 // 64},
        encoder={size: 0, 8: 1, 4: 2, 1: 1}, decoder={1: 1, 4: 3, 8: 2, 16: 1, size: 0})
    config = Config(**networks | settings)
    if config.signal == 'grey' and config.data in GREY:
        raise UserError(f'--signal grey: the images of --data {config.data} are grey already')
    return config
# ==== 7. TRAINING: one loop for both stages =======================================================
#    A stage is a module: noise(n, g) draws for a step, forward(x, *noise) gives `metrics`.
def build(config):
    """The module that `config` describes: a VAE for stage 1, a DiffuseVAE for stage 2."""
    c, C, bf16 = config, 1 if config.data in GREY else 3, config.precision == 'bfloat16'
    try:
        model = vae = None if c.form == 'uncond' else VAE(
            C, c.size, c.encoder, c.decoder, c.width, c.alpha, c.signal)
        shape = C, c.size, c.size
        if c.stage == 2:
            unet = UNet(2 * C if vae else C, C, c.size, c.channels, c.multipliers, c.blocks,
                        c.attention, c.heads, c.dropout, vae.z_dim * c.z_cond if vae else 0, bf16)
            model = DiffuseVAE(vae, unet, Diffusion(c.timesteps), c.form, shape, c.cond_drop)
        step = torch.zeros(2, *shape), *model.noise(2, generator())
        copy.deepcopy(model).to('meta')(*[tensor.to('meta') for tensor in step])  # do layers fit?
    except (ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
        if isinstance(error, NotImplementedError):  # an exercise that is not solved
            raise
        raise UserError(f'no network for --size {c.size} and these settings: {error!r}') from error
    return model
def choose_device(name):
    """The device of that name, by default CUDA if there is one, and the fast precision on it."""
    cuda = f'cuda:{os.environ.get("LOCAL_RANK", 0)}' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name or cuda)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {name}: not on this machine; cpu always is') from error
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    cpu = torch.cpu.get_capabilities() if device.type == 'cpu' else {}  # times: NOTES 4
    fast = (cpu.get('amx_bf16') or cpu.get('avx512_bf16') and 'AMD' in cpu['cpu_name']
            or device.type == 'cuda' and torch.cuda.is_bf16_supported())
    return device, 'bfloat16' if fast else 'float32'
def write_atomically(path, write):
    """write(buffer), then rename: `path` is the old file or the whole new one, never a part."""
    buffer, beside = io.BytesIO(), path.with_name(f'{path.name}.part{RANK}')
    write(buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open('wb') as file:
            file.write(buffer.getbuffer())
            os.fsync(file.fileno())  # the bytes are on the disk before they get their name
        os.replace(beside, path)
        if path.suffix == '.pt' and os.name == 'posix':  # and then a checkpoint's name, too
            os.fsync(folder := os.open(path.parent, os.O_RDONLY))
            os.close(folder)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f'{path}: not written, left as it was; {error.strerror}') from error
def read(path, parse, what):
    """parse(path), None if there is no such file, or a UserError if it is not `what`."""
    try:
        return parse(path) if path.exists() else None
    except Exception as error:  # on a damaged file parsers raise nearly anything
        raise UserError(f'{path}: damaged, or not {what}; move it away') from error
def load_checkpoint(out, stage, form):
    """The path of a checkpoint and its content on the CPU, None if there is no such file."""
    def parse(path):
        saved = dict(torch.load(path, map_location='cpu', weights_only=True))  # data, never code
        config = Config(**saved['config'])
        if (config.stage, config.form) != (stage, form) or not {'step', 'rows'} <= {*saved}:
            raise ValueError(path)
        return saved
    path = Path(out) / ('stage1.pt' if stage == 1 else f'stage2-{FORMS[form]}.pt')
    return path, read(path, parse, f'a checkpoint of stage {stage} form {form}')
def ema_update(averages, parameters, step, decay):
    """Average the parameters over the steps 0, 1, 2, ... (lists of tensors, in place)."""
    # average <- d average + (1 - d) parameter, d = min(decay, (1 + step) / (10 + step)), for with
    # 0.9999 throughout, 37% of the random initialisation would remain after 10,000 steps.
    d = min(decay, (1 + step) / (10 + step))
    for average, parameter in zip(averages, parameters):
        average.lerp_(parameter.detach(), 1 - d)
def report(text, end=False, last=[0.0]):
    """A line of progress: rewritten in place on a terminal, else a new line every ten seconds."""
    tty = sys.stdout.isatty()
    if RANK == 0 and (tty or end or time.monotonic() - last[0] > 10):
        print(f'\r{text}\x1b[K' if tty else text, end='' if tty and not end else '\n', flush=True)
        last[0] = time.monotonic()
def initialise(config, parent, images):
    """The model at step 0, its parameters a function of the seed; the VAE's are the parent's."""
    torch.manual_seed(config.seed)
    model = build(config).to(memory_format=torch.channels_last)
    if config.stage == 1 and config.preset == 'small':  # by default branches change 1% of h
        for conv in [c for m in model.modules() if isinstance(m, VAEBlock) for c in m.convs]:
            nn.init.kaiming_normal_(conv.weight)  # He et al.; positions are learnt sooner: NOTES 4
    if config.stage == 1 and config.data in GREY:  # mostly black: from 0.5 the sigmoid would die
        mean = images.batch(range(min(1000, len(images)))).mean()
        nn.init.constant_(model.head.bias, torch.logit(mean))
    if parent and model.vae:
        model.vae.load_state_dict(parent['model'] | parent['ema'])
    return model
def training_inputs(model, images, config, step, device):
    """(x, *noise) of a step: this process's share of what is a function of (seed, step) alone."""
    g, mine = generator(config.seed, 'step', step), slice(RANK, None, WORLD)
    torch.manual_seed(generator(config.seed, 'dropout', step, RANK).initial_seed())  # torch's own
    indices = torch.randint(len(images), (config.batch,), generator=g)
    mirrored = torch.rand(config.batch, 1, 1, 1, generator=g) < 0.5 * config.flip
    x = images.batch(indices[mine])
    x = torch.where(mirrored[mine], x if config.data in GREY else x.flip(3), x)
    inputs = x, *(noise[mine] for noise in model.noise(config.batch, g))
    pinned = [tensor.pin_memory() for tensor in inputs] if device.type == 'cuda' else inputs
    return [tensor.to(device, non_blocking=True) for tensor in pinned]
def training_step(model, optimizer, inputs, clip):
    """One step of Adam; the losses and the norm of the gradient: [len(metrics) + 1]."""
    losses = model(*inputs)
    optimizer.zero_grad()
    losses[0].backward()
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]['params'], clip)
    optimizer.step()
    return torch.stack([*losses, norm]).detach()
def command_train(given: Config):
    """train a stage: start, resume or extend it; presets, even "small", replace defaults shown"""
    stage, form = given['stage'], given.get('form', '1')
    if stage == 1 and form != '1':
        raise UserError(f'--form {form}: the VAE of stage 1 serves all forms; leave it out')
    data = (PRESETS[given.get('preset', 'small')][0] | given)['data']
    out = Path(given.get('out') or f'runs/{Path(data).resolve().name}')
    device, precision = choose_device(given.get('device'))
    path, saved = load_checkpoint(out, stage, form)
    source, parent = load_checkpoint(out, 1, '1') if stage == 2 and not saved else (path, None)
    if stage == 2 and form != 'uncond' and not (saved or parent):
        raise UserError(f'no {source}: first run python diffusevae.py train --stage 1 for it')
    config = resolve(given, (saved or parent or {}).get('config', {}), source)
    config.precision = config.precision or (precision if stage == 2 else 'float32')
    if config.batch % WORLD:
        raise UserError(f'--batch {config.batch}: {WORLD} processes cannot share it evenly')
    done = saved['step'] if saved else 0
    if config.steps <= done:
        return report(f'{path} is complete: {done} steps; a larger --steps extends it', end=True)
    report(f'{path}: steps {done} to {config.steps} on {device} in {config.precision}', end=True)
    return train(config, path, device, saved, parent)
def train(config, path, device, saved, parent):
    """The loop of both stages, from the checkpoint at `path` or step 0; returns the exit code."""
    images, unseen = [load_images(config.data, config.root, config.size, t) for t in (True, False)]
    shown = unseen.batch(range(min(16, len(unseen)))).to(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = initialise(config, parent, images).to(device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    ema = {name: p for name, p in averaged.state_dict().items() if name in trained}  # views
    optimizer = torch.optim.Adam(trained.values(), lr=config.lr, fused=True)
    first, rows, window = (saved['step'], saved['rows'], []) if saved else (0, [], [])
    if saved:
        read(path, lambda path: model.load_state_dict(saved['model']), 'of these settings')
        averaged.load_state_dict(saved['model'] | saved['ema'])
        optimizer.load_state_dict(saved['optimizer'])
    def save():
        pictures = sample_chunk(averaged, Sampling(), 0, 16) if config.stage == 2 else {
            'image': averaged.signal(shown), 'draft': averaged.decode(averaged.encode(shown)[0])}
        write_grid(path.with_suffix('.png'), pictures.items(), config.data)
        table = [['step', *model.metrics, 'grad_norm', 'lr', 'images_per_s'], *rows]
        write_atomically(path.with_suffix('.csv'), lambda file: file.write(
            ''.join(','.join(map(str, row)) + '\n' for row in table).encode()))
        content = dict(config=asdict(config), model=model.state_dict(), ema=ema,
                       optimizer=optimizer.state_dict(), step=done, rows=rows)
        write_atomically(path, partial(torch.save, content))  # last: if it is there, all are
    parallel = model
    if WORLD > 1:  # every process has all weights; gradients are averaged over processes
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    stop = []  # Ctrl-C: save and leave; a second one kills
    signal.signal(signal.SIGINT, lambda n, _: (stop.append(n), signal.signal(n, signal.SIG_DFL)))
    kept, start, save_time = first, time.monotonic(), time.monotonic()
    for step in range(first, config.steps):
        inputs = training_inputs(model, images, config, step, device)
        optimizer.param_groups[0]['lr'] = lr = config.lr * min(1, (step + 1) / config.warmup)
        window.append(training_step(parallel, optimizer, inputs, config.clip))
        ema_update([*ema.values()], [*trained.values()], step, config.ema)
        done, left = step + 1, config.steps - step - 1
        if done % 10 and left:
            continue
        values, window, now = torch.stack(window), [], time.monotonic()  # [steps, metrics]
        if False in (finite := values.isfinite().all(dim=1).tolist()):
            bad = done - len(values) + 1 + finite.index(False)
            good = f'{path} is good, of step {kept}' if kept else 'nothing was saved before'
            raise FloatingPointError(f'step {bad}: loss or gradient not finite; lower --lr; {good}')
        means, rate = values.mean(dim=0), (done - first) / (now - start)
        rows.append([done, *means.tolist(), lr, round(rate * config.batch, 1)])
        text = '  '.join(f'{name} {x:.4g}' for name, x in zip(model.metrics, rows[-1][1:]))
        report(f'step {done}/{config.steps}  {text}  {rate * config.batch:.0f} images/s  '
               f'{left / rate / 60:.1f} min left', end=not left)
        if RANK == 0 and (not left or stop or now - save_time + 10 / rate > config.save_every):
            save()
            kept, save_time = done, time.monotonic()
        if stop:
            report(f'interrupted: {path} holds step {done}; the same command goes on', end=True)
            return 128 + stop[0]
    report(f'{path} is complete; look at {path.with_suffix(".png")}', end=True)
# ==== 8. SAMPLING: z ~ N(0, I), x_hat = decoder(z), then the reverse chain ========================
CHUNK = 64  # images drawn together; what is random in a chunk is a function of (seed, chunk)
def load_trained(options, form=None):
    """The model of --out and --form with its averaged weights, its `Config`, and its path."""
    wanted = [form or options.form] if form or options.form else FORMS
    found = [load_checkpoint(options.out, 2, form) for form in wanted]
    path, saved = next((pair for pair in found if pair[1]), found[0])
    if not saved:
        raise UserError(f'no {path}: first train --stage 2 --form {[*wanted][0]}, or give --out')
    config, (device, _) = Config(**saved['config']), choose_device(options.device)
    config.precision = 'float32' if options.bits else config.precision
    if not options.steps <= (options.start or config.timesteps) <= config.timesteps:
        raise UserError(f'--steps {options.steps}: --steps <= --start <= T = {config.timesteps}')
    if options.guidance and not (config.cond_drop and config.form != 'uncond'):
        raise UserError(f'--guidance {options.guidance}: {path} was trained without --cond-drop')
    model = build(config).eval().to(device, memory_format=torch.channels_last)
    read(path, lambda _: model.load_state_dict(saved['model'] | saved['ema']), 'of these settings')
    return model.requires_grad_(False), config, path
def paint(model, options, z, noise=None, draft=None):
    """{'draft', 'refined': [n, C, H, W] in [0, 1], on the CPU} of codes z [n, z_dim], or of given
    drafts. noise() draws y_T and what follows; by default all n share one sequence."""
    shared, z = generator(options.seed, 'shared noise'), z.to(model.device)
    noise = noise or partial(torch.randn, 1, *model.image_shape, generator=shared)
    draw = lambda: noise()[:len(z)].to(model.device)
    y_T = options.temperature * draw().expand(len(z), -1, -1, -1)
    if model.vae:
        draft = model.vae.decode(z) if draft is None else draft.to(model.device)
    how = 'steps', 'sampler', 'spacing', 'start', 'sigma', 'eta', 'guidance'
    refined = model.refine(draft, z, y_T, draw, **{name: getattr(options, name) for name in how})
    return (dict(draft=draft.cpu()) if model.vae else {}) | dict(refined=refined.cpu())
def sample_chunk(model, options, chunk, n, mixture=None):
    """`paint`ed: the first n images of a chunk (the same for every n); z ~ N(0, I) or a mixture."""
    g = generator(options.seed, 'chunk', chunk)
    z = torch.randn(CHUNK, model.z_dim, generator=g)
    if mixture:  # z = m_k + L_k eps
        weights, means, L = mixture
        k = torch.multinomial(weights, CHUNK, replacement=True, generator=g)
        z = means[k] + torch.einsum('nij,nj->ni', L[k], z)
    own = partial(torch.randn, CHUNK, *model.image_shape, generator=g)
    return paint(model, options, z[:n], None if options.shared_noise else own)
def to_uint8(images, data):
    """[N, C, H, W] in [0, 1] -> uint8, rounded, without the padding of MNIST."""
    images = images[..., 2:-2, 2:-2] if data in GREY else images
    return (255 * images).round().clamp(0, 255).byte().cpu()
def write_grid(path, rows, data, columns=()):
    """Write (label, images [n, C, H, W] in [0, 1]) rows as one picture, labels in its margins."""
    (labels, rows), left, top = zip(*rows), 64, 16 * bool(columns)
    rows = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1.0)  # to one length
    images = to_uint8(rows.flatten(0, 1), data)
    grid = to_pil_image(utils.make_grid(images, nrow=rows.shape[1], padding=1, pad_value=255))
    s = max(1, 64 // images.shape[-1])  # about 64 pixels an image, or more
    sheet = ImageOps.expand(ImageOps.scale(grid, s, Image.NEAREST), (left, top, 0, 0), 'white')
    text, step = ImageDraw.Draw(sheet).text, s * (images.shape[-1] + 1)
    for i, label in enumerate(labels):
        text((4, top + (i + 0.5) * step), label, 'black', anchor='lm')
    for i, label in enumerate(columns):
        text((left + (i + 0.5) * step, 2), label, 'black', anchor='mt')
    write_atomically(path, partial(sheet.save, format='png'))
def command_sample(options: Sampling):
    """generate images: a grid of drafts above refined images, or a folder of PNGs"""
    model, config, path = load_trained(options)
    num, start = options.num or CHUNK, time.monotonic()
    if num > CHUNK and not options.png:
        raise UserError(f'--num {num}: a grid holds {CHUNK}; --png takes any number')
    mixture, settings = mixture_of(model, config, path, options), identity(options, path)
    make = lambda chunk, n: sample_chunk(model, options, chunk, n, mixture)
    if options.real:
        images, settings = load_images(config.data, config.root, config.size), {'real': config.data}
        make = lambda chunk, n: dict(real=images.batch(range(chunk * CHUNK, chunk * CHUNK + n)))
        if not options.png or num > len(images):
            raise UserError(f'--real: needs --png FOLDER and a --num up to {len(images)}')
    if not options.png:
        drawn, grid = make(0, num), path.with_name(f'samples-{FORMS[config.form]}.png')
        rows = [(name, x[i:i + 16]) for i in range(0, num, 16) for name, x in drawn.items()]
        write_grid(grid, rows, config.data)
        return print(f'{grid}: {" above ".join(drawn)}')
    names = ['real'] if options.real else ['drafts', 'refined'] if model.vae else ['refined']
    folder, note = Path(options.png), Path(options.png, 'settings.json')
    before = read(note, lambda note: json.loads(note.read_text()), 'the settings of images')
    if before not in (None, settings):
        raise UserError(f'--png {folder}: was made with {before}')
    if RANK == 0:
        write_atomically(note, lambda file: file.write(json.dumps(settings, indent=1).encode()))
    for first in range(RANK * CHUNK, num, WORLD * CHUNK):  # processes share the chunks
        end = min(num, first + CHUNK)
        paths = [folder / name / f'{i:06}.png' for name in names for i in range(first, end)]
        if not all(path.exists() for path in paths):
            drawn = torch.cat([*make(first // CHUNK, end - first).values()])
            for path, image in zip(paths, map(to_pil_image, to_uint8(drawn, config.data))):
                write_atomically(path, partial(image.save, format='png'))
        left = (time.monotonic() - start) * (num / end - 1) / 60
        report(f'{end}/{num} images in {folder}  {left:.1f} min left', end=end == num)
# ==== 9. EXPERIMENTS: the paper's claims, each a table or a picture ===============================
def laplacian_pyramid(x):
    """[N, C, R, R] -> what each halving of the resolution loses, finest first, and the rest."""
    row = torch.tensor([1, 4, 6, 4, 1], device=x.device) / 16
    kernel = (row[:, None] * row).expand(x.shape[1], 1, 5, 5)  # a blur, close to a Gaussian
    levels = []
    while x.shape[-1] >= 16:
        low = F.conv2d(F.pad(x, [2] * 4, 'reflect'), kernel, stride=2, groups=x.shape[1])
        levels.append(x - F.interpolate(low, size=x.shape[2:], mode='bilinear'))
        x = low
    return [*levels, x]
def sliced_wasserstein(images, real, patches=64, directions=128):
    """Distance of two sets [N, C, R, R] at each level of the Laplacian pyramid, times 1000: [L].
    Karras et al. 2018. It needs no pretrained network; it is not FID and not comparable to it."""
    # In one dimension the Wasserstein distance is that of the sorted values; 7x7 patches have 49 C,
    # so it is averaged over random directions. Both sets are normalised by the real one's mean and
    # deviation: normalised by their own, drifting colours and weak contrast would not show.
    g, distances = generator('sliced Wasserstein'), []
    for ours, theirs in zip(laplacian_pyramid(images), laplacian_pyramid(real)):
        mean, std = theirs.mean((0, 2, 3), keepdim=True), theirs.std((0, 2, 3), keepdim=True)
        n, c, R, _ = theirs.shape
        place = torch.randint((R - 6) ** 2, (n, 1, patches), generator=g).expand(-1, c * 49, -1)
        project = F.normalize(torch.randn(c * 49, directions, generator=g), dim=0)
        chosen = [F.unfold((level - mean) / std, 7).gather(2, place) for level in (ours, theirs)]
        a, b = [rearrange(patch, 'n d p -> (n p) d') @ project for patch in chosen]
        distances.append((a.sort(dim=0).values - b.sort(dim=0).values).abs().mean())
    return 1000 * torch.stack(distances)
def em_step(z, r, ridge=1e-6):
    """From responsibilities r [N, K] to a mixture (w [K], m [K, D], S [K, D, D]), then to its
    responsibilities for z [N, D], and its mean log-likelihood."""
    # N_k = sum_n r_nk, w_k = N_k / N, m_k = sum_n r_nk z_n / N_k,
    # S_k = sum_n r_nk (z_n - m_k)(z_n - m_k)^T / N_k + ridge I: else singular if N_k < D.
    # Then r_nk = p(k|z_n) = w_k N(z_n; m_k, S_k) / p(z_n), p(z_n) = sum_k of that; all in logs.
    w, m = r.mean(0), r.T @ z / r.sum(0)[:, None]
    S = torch.stack([torch.cov(z.T, correction=0, aweights=r_k) for r_k in r.T])
    S = S + ridge * torch.eye(z.shape[1]).to(z)
    log_p = [MultivariateNormal(m_k, S_k).log_prob(z) for m_k, S_k in zip(m, S)]
    joint = w.log() + torch.stack(log_p, dim=1)  # log p(z, k): [N, K]
    return (w, m, S), joint.softmax(dim=1), joint.logsumexp(dim=1).mean()
def fit_mixture(z, K, g, iterations=100, ridge=1e-6):
    """EM for z [N, D]: weights, means, covariances; and each iteration's mean log-likelihood."""
    means = z[torch.randperm(len(z), generator=g)[:K]]
    for _ in range(10):  # k-means: every z to its nearest mean, every mean to its z's
        r = F.one_hot(torch.cdist(z, means).argmin(1), len(means)).to(z)  # [N, K]
        means = r.T @ z / r.sum(0).clamp(min=1)[:, None]
    r, likelihoods = 0.99 * r + 0.01 / len(means), []  # none starts empty
    for _ in range(iterations):
        mixture, r, log_p = em_step(z, r, ridge)
        likelihoods.append(log_p.item())
    return mixture, likelihoods
def identity(options, path):
    """What tells one set of samples from another: the settings, and when the model was saved."""
    fixed = [f.name for f in fields(Sampling) if f.metadata['kind'] == 'fixed']
    return {name: getattr(options, name) for name in fixed} | dict(model=path.stat().st_mtime_ns)
def codes(model, config):
    """(mu, logvar) of all training images, each [N, z_dim] on the CPU, and their labels."""
    images = load_images(config.data, config.root, config.size)
    encoded = [model.vae.encode(images.batch(i).to(model.device))
               for i in torch.arange(len(images)).split(500)]
    return [torch.cat(part).cpu() for part in zip(*encoded)], images.labels
def mixture_of(model, config, path, options):
    """--gmm: weights, means, Cholesky factors of Gaussians fitted to z ~ q(z|x); else None."""
    # Ex-PDE, ex-post density estimation: the codes of the training images are not quite N(0, I), so
    # that z ~ N(0, I) falls in part where the decoder never trained. The fit is kept in a file.
    if not (options.gmm and model.vae):
        return None
    cache = path.with_name(f'{path.stem}-gmm{options.gmm}-{path.stat().st_mtime_ns}.pt')
    load = lambda path: [part.float() for part in torch.load(path, weights_only=True)]
    if not (mixture := read(cache, load, 'a mixture')):
        (mu, logvar), g = codes(model, config)[0], generator('gmm')
        z = reparameterize(mu, logvar, torch.randn(mu.shape, generator=g)).double()
        (w, m, S), _ = fit_mixture(z, options.gmm, g)
        mixture = [p.float() for p in (w, m, torch.linalg.cholesky(S))]
        write_atomically(cache, partial(torch.save, mixture))
    return mixture
def bound(model, x, g, sigma='small', strata=20):
    """Upper bound of -log p(x) for x [B, C, H, W] in [0, 1]: its terms in nats, {name: [B]}.
    The chain's sum takes one random t of each of `strata` parts; T - 1 parts are the whole sum."""
    # -log p(x_0) <= KL( q(z|x_0) || p(z) ) + L_T + sum_t L_t + L_0, with the draft of z ~ q(z|x_0):
    #   L_T = KL( q(y_T|x_0) || N(0, I) )
    #   L_t = KL( q(y_t-1|y_t, x_0) || p(y_t-1|y_t) ), two Gaussians, whose means differ in x_0 only
    #   L_0 = -log p(x_0|y_1), the mass of a Gaussian of variance beta~_2 in the bin of each pixel
    alpha_bar = x.new_tensor(model.diffusion.schedule, dtype=torch.float64).view(-1, 1, 1, 1)
    T, x_0, x_hat, z, terms = len(alpha_bar), 2 * x.double() - 1, None, None, {}
    draw = lambda *shape: torch.randn(shape, generator=g).to(x.device)
    total = lambda term: term.flatten(1).sum(1)
    if model.vae:
        mu, logvar = model.vae.encode(x)
        z = reparameterize(mu, logvar, draw(*mu.shape))
        x_hat, terms['code'] = 2 * model.vae.decode(z) - 1, kl_divergence(mu, logvar).double()
    def prediction(t):  # x_0, as the network predicts it from y_t ~ q(y_t|x_0)
        y_t = q_sample(x_0, alpha_bar[t], draw(*x.shape))
        eps = model.eps_theta(y_t.float(), t, x_hat, z).double()
        return predict_x0(y_t, alpha_bar[t], eps).clamp(-1, 1)
    last, chain = alpha_bar[-1], 0
    terms['L_T'] = total(kl_normal(Normal(last**0.5 * x_0, (1 - last) ** 0.5), Normal(0.0, 1.0)))
    for part in torch.arange(1, T).tensor_split(strata):
        t = part[(len(part) * torch.rand(len(x), generator=g)).long()].to(x.device)
        difference, v_q = q_posterior(x_0 - prediction(t), 0, alpha_bar[t], alpha_bar[t - 1])
        v_p = v_q if sigma == 'small' else 1 - alpha_bar[t] / alpha_bar[t - 1]
        kl = kl_normal(Normal(difference, v_q**0.5), Normal(0.0, v_p**0.5))
        chain = chain + len(part) * total(kl)
    mean = prediction(torch.zeros(len(x), dtype=torch.long, device=x.device))
    std = q_posterior(0, 0, alpha_bar[1], alpha_bar[0])[1] ** 0.5
    # Pixel values are 2/255 apart; the bins of -1 and 1 are open. The Gaussian is symmetric: take
    # the lower tail, for in the upper one its distribution function, near 1, is inexact.
    log_cdf = lambda edge: torch.special.log_ndtr((edge - (x_0 - mean).abs()) / std)
    low, high = log_cdf(-1 / 255).where(x_0.abs() < 0.999, -math.inf), log_cdf(1 / 255)
    return terms | dict(chain=chain, decoder=-total(high + torch.log1p(-(low - high).exp())))
def slerp(a, b, w):
    """From a (w = 0) to b (w = 1) along the arc between them: tensors of one shape, as vectors."""
    # sin((1-w) theta) / sin(theta) a + sin(w theta) / sin(theta) b, theta the angle of a and b.
    # Clamp the cosine: finite at theta = 0. The mean of two noises has only half their variance.
    theta = F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-0.9999, 0.9999).acos()
    return (((1 - w) * theta).sin() * a + (w * theta).sin() * b) / theta.sin()
def command_evaluate(options: Sampling):
    """a table of distances to held-out images: all trained models, by sampler and network calls"""
    options = replace(options, steps=1)  # each row has its own number
    models = [load_trained(options, form) for form in FORMS if options.form in (None, form)
              and load_checkpoint(options.out, 2, form)[1]] or [load_trained(options)]
    config, num = models[0][1], options.num or (200 if options.bits else 500)
    T = options.start or min(config.timesteps for _, config, _ in models)
    train, held_out = [load_images(config.data, config.root, config.size, t) for t in (True, False)]
    if num > len(held_out) or num * options.seeds > len(train):
        raise UserError(f'--num {num}: of {len(train)} training, {len(held_out)} other images')
    if not 1 <= min(options.calls, default=0) <= max(options.calls) <= T:
        raise UserError(f'--calls {options.calls}: must be from 1 to {T}')
    real = held_out.batch(range(num))
    if options.bits:
        return print_bits(models, real, options)
    def generated(what, model, mixture, row, i):
        row = replace(row, seed=row.seed + i)
        return torch.cat([sample_chunk(model, row, chunk, len(part), mixture)[what]
                          for chunk, part in enumerate(real.split(CHUNK))])
    jobs = {'floor: training images': (  # name: network calls, what identifies it, images of seed i
        0, f'{config.data} {config.size}', lambda i: train.batch(range(i * num, (i + 1) * num)))}
    for model, config, path in models:
        mixture = mixture_of(model, config, path, options)
        rows = {'drafts': (1, 'draft', options)} if model.vae else {}
        for (sampler, spacing), calls in itertools.product(EVALUATED, options.calls):
            steps = max(1, calls // (1 + (options.guidance > 0)))  # two calls a guided step
            row = replace(options, sampler=sampler, spacing=spacing, steps=steps)
            rows[f'{sampler} {spacing}, {calls} calls'] = calls, 'refined', row
        for name, (calls, what, row) in rows.items():
            images = partial(generated, what, model, mixture, row)
            jobs[f'{FORMS[config.form]} {name}'] = calls, identity(row, path), images
    store = Path(options.json or f'{options.out}/evaluate.json')  # all that was ever measured
    cells = read(store, lambda path: {k: torch.tensor(d).flatten(1).tolist() for k, d in
                 json.loads(path.read_text()).items()}, 'a table of evaluate') or {}
    key = {name: f'{name} {num} {options.seeds} {job[1]}' for name, job in jobs.items()}
    todo, start = [jobs[name][0] for name in jobs if key[name] not in cells], time.monotonic()
    sample_chunk(models[0][0], Sampling(steps=2), 0, CHUNK)  # for its time
    seconds = (time.monotonic() - start) / 2 / CHUNK * num * sum(todo) + 3 * len(todo)
    print(f'{len(todo)} of {len(jobs)} cells left, about {options.seeds * seconds / 60:.0f} min\n'
          f'Distance to {num} held-out images (not FID) +- standard error (by level)', flush=True)
    for name, (_, _, images) in jobs.items():
        if (k := key[name]) not in cells:
            cells[k] = [sliced_wasserstein(images(i), real).tolist() for i in range(options.seeds)]
            write_atomically(store, lambda file: file.write(json.dumps(cells).encode()))
        d = torch.tensor(cells[k])  # [seeds, levels]
        error, levels = d.mean(1).std() / len(d) ** 0.5, ' '.join(f'{x:.1f}' for x in d.mean(0))
        print(f'{name:36} {d.mean():7.1f} +- {error:.1f} ({levels})', flush=True)
def print_bits(models, x, options):
    """The bound of each model for images x, its terms apart, in bits per dimension."""
    if options.gmm or options.guidance or options.start or options.temperature != 1:
        raise UserError('--bits: without --gmm, --guidance, --start and --temperature')
    for (model, config, _), sigma in itertools.product(models, ('small', 'large')):
        nats_per_bit = to_uint8(x[:1], config.data).numel() * math.log(2)  # without the padding
        g = generator(options.seed, 'bits')
        parts = [bound(model, part.to(model.device), g, sigma) for part in x.split(CHUNK)]
        bits = {name: torch.cat([p[name] for p in parts]) / nats_per_bit for name in parts[0]}
        total = sum(bits.values())
        terms = '  '.join(f'{name} {term.mean():.4f}' for name, term in bits.items())
        print(f'{FORMS[config.form]:7} {sigma:5}: at most {total.mean():.3f} '
              f'+- {total.std() / len(total) ** 0.5:.3f} bits/dim: {terms}', flush=True)
def held_out_codes(options):
    """For pictures: model, `Config`, held-out images, their mean codes, and what writes rows."""
    model, config, path = load_trained(options)
    if (num := options.num or 8) > CHUNK or not model.vae:
        raise UserError(f'--form {config.form} --num {num}: takes form 1 or 2, up to {CHUNK}')
    held_out = load_images(config.data, config.root, config.size, train=False)
    x = held_out.batch([i % len(held_out) for i in range(max(2, num))])
    mu = model.vae.encode(x.to(model.device))[0].cpu()
    def write(name, rows, columns=()):
        write_grid(path.with_name(f'{name}-{FORMS[config.form]}.png'), rows, config.data, columns)
    return model, config, x, mu, write
def command_reconstruct(options: Sampling):
    """held-out images, the VAE's drafts of their mean codes, and these refined"""
    model, config, x, mu, write = held_out_codes(options)
    rows = {'image': x, config.signal: model.vae.signal(x)} | paint(model, options, mu)
    write('reconstruct', rows.items())
def command_interpolate(options: Sampling):
    """between the codes of two held-out images with all noise shared; and between two noises"""
    model, _, x, mu, write = held_out_codes(options)
    w = torch.linspace(0, 1, options.num or 8)
    along = slerp if options.path == 'slerp' else torch.lerp
    rows = paint(model, options, torch.stack([along(mu[0], mu[1], v) for v in w]))
    g = [generator(options.seed, key) for key in ('shared noise', 'other noise')]
    def between():  # at every step, not only y_T, which a long chain forgets
        a, b = [torch.randn(1, *model.image_shape, generator=one) for one in g]
        return torch.cat([slerp(a, b, v) for v in w])
    rows['other noise'] = paint(model, options, mu[:1].expand(len(w), -1), between)['refined']
    write('interpolate', rows.items(), [f'{v:.2f}' for v in w])
def has_attribute(labels, text):
    """Which images have an attribute, e.g. kind=circle, digit=3, size>0.5 or Smiling: bool [N]."""
    name, relation, value = re.fullmatch(r'([^=<>]*)([=<>]?)(.*)', text or '', re.DOTALL).groups()
    try:
        number = KINDS.index(value) if name == 'kind' else float(value or 1)
        has = {'>': torch.gt, '<': torch.lt}.get(relation, torch.eq)(labels[name], number)
    except (KeyError, ValueError) as error:
        raise UserError(f'--attribute {text}: there are {", ".join(labels) or "no labels"}; kinds '
                        f'are {", ".join(KINDS)}, other values numbers') from error
    if has.all() or not has.any():
        raise UserError(f'--attribute {text}: is true of {has.sum()} of {len(has)} images')
    return has
def command_edit(options: Sampling):
    """move codes along an attribute: the mean code of images with it minus that of those without"""
    model, config, x, mu, write = held_out_codes(options)
    (all_mu, _), labels = codes(model, config)
    has = has_attribute(labels, options.attribute)
    d = all_mu[has].mean(0) - all_mu[~has].mean(0)  # the direction
    s = torch.linspace(-2, 2, options.num or 9)
    rows = [row for z in mu[:3] for row in paint(model, options, z + s[:, None] * d).items()]
    write('edit', rows, [f'{strength:+.1f}' for strength in s])
def command_robust(options: Sampling):
    """damage a draft more and more before it is refined: by noise, by blur, by missing blocks"""
    model, _, _, mu, write = held_out_codes(options)
    strengths, g = torch.linspace(0, 1, options.num or 8), generator(options.seed, 'robust')
    s, rows = rearrange(strengths, 'n -> n 1 1 1'), []
    draft = model.vae.decode(mu[:1].to(model.device)).cpu()
    noise = (draft + 0.5 * s * torch.randn(draft.shape, generator=g)).clamp(0, 1)
    blur = torch.cat([gaussian_blur(draft, 31, 0.01 + 6 * v.item()) for v in strengths])
    block = torch.rand(1, 1, *[r // 4 for r in draft.shape[2:]], generator=g)  # of 4x4 pixels
    blocks = draft.where(F.interpolate(block, size=draft.shape[2:]) >= s, draft.mean())
    for name, x_hat in dict(noise=noise, blur=blur, blocks=blocks).items():
        refined = paint(model, options, mu[:1].expand(len(s), -1), draft=x_hat)['refined']
        rows += [(name, x_hat), ('refined', refined)]
    write('robust', rows, [f'{v:.2f}' for v in strengths])
def command_bench(options: Other):
    """speed of two networks as a share of the device's own, and what the presets' runs cost"""
    device, fast = choose_device(options.device)
    def setup(preset, stage, device, layout, **changes):
        config = replace(resolve(dict(stage=stage, preset=preset), {}, ''), **changes)
        images = Images(torch.zeros(1, 3, config.size, config.size, dtype=torch.uint8))
        model = build(config).to(device, memory_format=layout)
        return config, model, training_inputs(model, images, config, 0, device)
    def flops(work):  # floating-point operations
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()
    def speed(work):  # images/s and TFLOP/s, the fastest of five; the sum waits for the device
        seconds = min(timeit.repeat(lambda: work().sum().item(), number=1, repeat=5))
        return 16 / seconds, flops(work) / seconds / 1e12
    print('A step in plain float32 and as in a run: images/s, TFLOP/s, share of a large product')
    modes = ('float32', torch.contiguous_format), (fast, torch.channels_last)
    for preset, (dtype, layout) in itertools.product(('small', 'cifar10'), modes):
        _, model, inputs = setup(preset, 2, device, layout, batch=16, precision=dtype)
        adam, (x, z, *_) = torch.optim.Adam(model.unet.parameters(), fused=True), inputs
        square = torch.randn(4096, 4096, device=device, dtype=getattr(torch, dtype))
        _, peak = speed(lambda: square @ square)
        for name, work in (('training', lambda: training_step(model, adam, inputs, 1.0)),
                ('sampling', lambda: model.eval().refine(x, z, x, lambda: 0, steps=1))):
            images, rate = speed(work)
            print(f'{preset:8} {dtype:8} {name} {images:9.1f} {rate:9.3f} {rate / peak:9.0%}')
    print(f'\nA projection: FLOPs of a whole run, and hours at {options.tflops} TFLOP/s')
    for preset, stage in itertools.product(PRESETS, (1, 2)):
        config, model, inputs = setup(preset, stage, torch.device('meta'), torch.channels_last)
        total = config.steps * flops(lambda: model(*inputs)[0].backward())
        print(f'{preset:12} stage {stage} {total:9.1e} {total / 3600e12 / options.tflops:9.1f}')
# ==== 10. COMMAND LINE, AND EXERCISES =============================================================
EXERCISES = dict(reparameterize=1, kl_divergence=2, negative_elbo=2, linear_schedule=1, q_sample=1,
                 predict_x0=1, q_posterior=3, ddpm_step=2, ddim_step=3, ddpm_loss=2,
                 time_embedding=1, network_input=1, ema_update=2, em_step=3, slerp=2)  # points
def command_exercise(options: Other):
    """write a copy of this file with the bodies of exercises blanked, for a student to fill in"""
    numbers, path = {name: i for i, name in enumerate(EXERCISES, 1)}, Path(options.out)
    if options.list:
        return print('\n'.join(f'{i:2}  {n:15} {EXERCISES[n]} points' for n, i in numbers.items()))
    if not {*options.only} <= {*numbers.values()}:
        raise UserError(f'--only {options.only}: exercises have numbers from 1 to {len(numbers)}')
    if path.exists():
        raise UserError(f'--out {path}: exists already; move it, or name another file')
    lines = (source := Path(__file__).read_text(encoding='utf-8')).splitlines()
    for node in reversed(ast.parse(source).body):  # from the end, so that line numbers stay right
        number = numbers.get(getattr(node, 'name', None), 0)
        if number in (options.only or numbers.values()):  # docstring and formula stay
            body = slice(node.body[1].lineno - 1, node.end_lineno)
            lines[body] = [f"    raise NotImplementedError('Exercise {number}: {node.name}')"]
    write_atomically(path, lambda file: file.write(('\n'.join(lines) + '\n').encode()))
    print(f'{path}: fill it in, and grade it with DIFFUSEVAE={path} pytest')
def main(argv=None):
    """Run one command of the command line; returns the exit code."""
    def fail(message):  # argparse would print the usage, too, and exit
        raise UserError(message)
    parser = argparse.ArgumentParser('diffusevae.py', description=__doc__.split('\n')[0])
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    for run in [value for name, value in globals().items() if name.startswith('command_')]:
        name, text, (settings,) = run.__name__[8:], run.__doc__, run.__annotations__.values()
        sub = commands.add_parser(name, allow_abbrev=False, help=text, description=text)
        sub.set_defaults(run=run, settings=settings)
        sub.error = parser.error = fail
        for f in fields(settings):  # absent from the result unless given
            how = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
                type=f.type, choices=f.metadata['choices'])
            default = '' if str(f.default) in ('None', 'False', '()') else f' (default {f.default})'
            if name in (f.metadata['only'] or name):
                sub.add_argument(*['-o'] * (f.name == 'out'), f'--{f.name.replace("_", "-")}',
                                 default=argparse.SUPPRESS, **how, required=f.name == 'stage',
                                 help=f.metadata['help'] + default)
    try:
        given = vars(parser.parse_args(argv))
        run, settings = given.pop('run'), given.pop('settings')
        for f in fields(settings):
            value, low, high = given.get(f.name), f.metadata['low'], f.metadata['high']
            if None not in (value, low) and not low <= value <= high:  # nan is out of any range
                raise UserError(f'--{f.name.replace("_", "-")} {value}: not from {low} to {high}')
        return run(given if settings is Config else settings(**given)) or 0
    except (UserError, OSError, NotImplementedError, FloatingPointError,
            torch.OutOfMemoryError) as error:  # the last: of CUDA, e.g. by too large a --batch
        print('error:', ' '.join(str(error).splitlines()), file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        return 130
if __name__ == '__main__':
    sys.exit(main())
