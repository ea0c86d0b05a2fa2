"""The second half of the teaching: every test states a property, checked against something else.

Sections as in diffusevae.py. No network, no GPU; the data files are made on the spot. The few
tests that start processes are at the end.
"""
import csv
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image
from torch.distributions import (Categorical, MixtureSameFamily, MultivariateNormal, Normal,
                                 kl_divergence)

import diffusevae as dv

torch.set_num_threads(2)
T = 1000
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)


def few_shapes(n, generator, size=32, draw=dv.draw_shapes):
    """At most 1,000 images where a program's run draws 22,000: most of a short test's time."""
    return draw(min(n, 1000), generator, size)


dv.draw_shapes = few_shapes  # here; processes draw all


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def count(module):
    return sum(p.numel() for p in module.parameters())


def config(stage=2, **given):
    return dv.resolve(dict(stage=stage, **given), {}, None)


def tiny(form='1', z_cond=False, channels=1, size=8, T=T, **unet):
    """A DiffuseVAE for 8x8 images with random weights in the zero-initialised layers, too."""
    torch.manual_seed(0)
    width = {8: 8, 4: 8, 1: 4}
    vae = None
    if form != 'uncond':
        vae = dv.VAE(channels, size, '8d2,4d4,4t1', '1u4,1t4,4u2,4t8', width)
    net = dv.UNet(channels * (1 if form == 'uncond' else 2), channels, size, 8, [1, 2], 1, [4],
                  heads=2, z_dim=4 * z_cond, **unet)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return dv.DiffuseVAE(vae, net, dv.Diffusion(T), form, (channels, size, size))


def generate(model, z, y_T, noise, **how):
    """A draft, and it refined."""
    draft = model.vae.decode(z) if model.vae else None
    return draft, model.refine(draft, z, y_T, noise, **how)


# 1. DATA ------------------------------------------------------------------------------------------


def test_shapes_repeat_and_their_factors_describe_them():
    """The same seed gives the same image; ground colour, position and size show in the pixels."""
    images, factors = dv.draw_shapes(200, dv.generator(3))
    again, _ = dv.draw_shapes(200, dv.generator(3))
    assert images.dtype == torch.uint8 and images.shape == (200, 3, 32, 32)
    assert torch.equal(images, again)
    assert set(factors) == {'kind', 'hue', 'ground', 'x', 'y', 'size'}
    assert set(factors['kind'].tolist()) == {0, 1, 2}
    corner = images[:, :, 0, 0].float()
    inside = ((images - corner[:, :, None, None].byte()).float().abs().sum(1) > 30).double()
    grid = (torch.arange(32) + 0.5) / 32
    for axis, name in ((1, 'x'), (2, 'y')):
        center = (inside.sum(axis) * grid).sum(1) / inside.sum((1, 2))
        assert (center - 0.435 - 0.13 * factors[name]).abs().max() < 0.03
    circle = factors['kind'] == 1
    area = inside.mean((1, 2))[circle]
    radius = 0.95 * (0.27 + 0.08 * factors['size'][circle].double())
    assert torch.allclose(area, math.pi * (radius + 1 / 32)**2, rtol=0.15)  # its edge is soft


def test_shapes_are_held_out_by_another_seed():
    train, held_out = dv.load_images('shapes'), dv.load_images('shapes', train=False)
    known = {image.numpy().tobytes() for image in train.pixels}
    assert not any(image.numpy().tobytes() in known for image in held_out.pixels[:100])


def mnist_files(root, name='MNIST', n=40):
    """The four IDX files with n random images each, labels 0 ... 9 in turn."""
    raw = root / name / 'raw'
    raw.mkdir(parents=True)
    for part, seed in (('train', 0), ('t10k', 1)):
        pixels = torch.randint(256, (n, 28, 28), generator=torch.Generator().manual_seed(seed))
        header = struct.pack('>4B3I', 0, 0, 8, 3, n, 28, 28)
        (raw / f'{part}-images-idx3-ubyte').write_bytes(header + bytes(pixels.flatten().tolist()))
        header = struct.pack('>4BI', 0, 0, 8, 1, n)
        (raw / f'{part}-labels-idx1-ubyte').write_bytes(header + bytes(i % 10 for i in range(n)))
    return root


@pytest.mark.parametrize('data, folder, label', [('mnist', 'MNIST', 'digit'),
                                                 ('fashion', 'FashionMNIST', 'class')])
def test_digits_are_padded_to_32_and_never_mirrored(tmp_path, data, folder, label):
    images = dv.load_images(data, mnist_files(tmp_path, folder))
    assert images.pixels.shape == (40, 1, 32, 32) and images.labels[label].tolist()[:3] == [0, 1, 2]
    x = images.batch([0, 1])
    assert x[:, :, 2:-2, 2:-2].max() > 0.9 and x.sum() == x[:, :, 2:-2, 2:-2].sum()
    assert dv.to_uint8(x, data).shape == (2, 1, 28, 28)
    assert not torch.equal(x, dv.load_images(data, tmp_path, train=False).batch([0, 1]))
    for stage in (1, 2):
        assert not config(stage, data=data).flip and not config(stage, data=data, flip=True).flip


def test_cifar10_keeps_its_channels(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10
    monkeypatch.setattr(CIFAR10, '_check_integrity', lambda self: True)
    monkeypatch.setattr(CIFAR10, '_load_meta', lambda self: None)
    folder = tmp_path / 'cifar-10-batches-py'
    folder.mkdir()
    red_then_green = bytes([200] * 1024 + [100] * 1024 + [0] * 1024)
    for name in [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']:
        data = np.frombuffer(red_then_green, dtype=np.uint8)[None]
        (folder / name).write_bytes(pickle.dumps(dict(data=data, labels=[7])))
    images = dv.load_images('cifar10', tmp_path)
    assert images.pixels.shape == (5, 3, 32, 32) and images.labels['class'].tolist() == [7] * 5
    assert (255 * images.batch([0]).mean((2, 3))).round().tolist() == [[200, 100, 0]]


def picture(path, colour=(255, 0, 0), size=(40, 30), mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, colour).convert(mode).save(path)


def test_folder_of_mixed_images(tmp_path, capsys):
    """Nested folders, sizes and modes; a broken file is named and skipped."""
    for i in range(30):
        picture(tmp_path / f'a{i % 3}' / f'{i}.png', size=(20 + i, 50 - i))
    for i, mode in enumerate(('L', 'P', 'RGBA', 'CMYK', '1')):
        picture(tmp_path / f'mode{i}.{"jpg" if mode == "CMYK" else "png"}', mode=mode)
    (tmp_path / 'broken.png').write_bytes(b'no image')
    (tmp_path / 'notes.txt').write_text('not counted')
    train, held_out = (dv.load_images(tmp_path, size=16, train=train) for train in (True, False))
    assert len(train) + len(held_out) == 35 and len(held_out) >= 1
    assert train.pixels.shape[1:] == (3, 16, 16)
    assert 'broken.png' in capsys.readouterr().err


def test_folder_sixteen_bits_are_scaled_not_clipped(tmp_path):
    for i in range(2):
        Image.new('I;16', (8, 8), 128 * 256).save(tmp_path / f'{i}.png')
    assert (255 * dv.load_images(tmp_path, size=8).batch([0])).round().unique().tolist() == [128]


def test_folder_is_cropped_at_the_centre(tmp_path):
    wide = Image.new('RGB', (96, 32), (0, 0, 255))
    wide.paste((255, 255, 255), (32, 0, 64, 32))
    for i in range(2):
        wide.save(tmp_path / f'{i}.png')
    assert dv.load_images(tmp_path, size=32).batch([0])[..., 2:-2].min() > 0.95


def test_folder_held_out_images_stay_held_out(tmp_path):
    """Five percent, by name: the same for a moved folder, disjoint from training, and stable."""
    colours = [(i, j, 0) for i in range(0, 250, 10) for j in range(0, 240, 20)]
    for i, colour in enumerate(colours):
        picture(tmp_path / 'one' / f'{i}.png', colour, (8, 8))
    shutil.copytree(tmp_path / 'one', tmp_path / 'two')
    for i in range(20):
        picture(tmp_path / 'two' / f'new{i}.png', (0, 0, 255), (8, 8))
    colour_set = lambda folder, train: {tuple(image[:, 0, 0].tolist()) for image in
                                        dv.load_images(folder, size=8, train=train).pixels}
    held_out = colour_set(tmp_path / 'one', False)
    assert not held_out & colour_set(tmp_path / 'one', True)
    assert held_out <= colour_set(tmp_path / 'two', False)
    assert 5 <= len(held_out) <= 30


def test_large_sets_are_read_from_files_when_asked_for(tmp_path):
    """Over 1 GB only names are kept; an unreadable file gives way to the next."""
    paths = [str(tmp_path / f'{i}.png') for i in range(100_000)]
    for i in (7, 6, 300):
        Image.new('RGB', (64, 64), (i % 256, 0, 0)).save(paths[i])
    images = dv.Images(paths, size=64)  # 1.2 GB; all other files would be errors
    assert len(images) == 100_000 and not images.unreadable
    x = images.batch(torch.tensor([7, 5, 300]))
    assert (255 * x[:, 0, 0, 0]).round().tolist() == [7, 6, 300 % 256]
    assert images.unreadable == {5}


# 2. VAE -------------------------------------------------------------------------------------------


def test_kl_agrees_with_monte_carlo_and_with_torch():
    mu, logvar = randn(3, 5, seed=1), randn(3, 5, seed=2)
    q, p = Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)
    assert torch.allclose(dv.kl_divergence(mu, logvar), kl_divergence(q, p).sum(1))
    z = mu + (logvar / 2).exp() * randn(200_000, 3, 5, seed=3)
    estimate = (q.log_prob(z) - p.log_prob(z)).sum(2).mean(0)
    assert torch.allclose(dv.kl_divergence(mu, logvar), estimate, rtol=0.02)


def test_reparameterized_samples_have_mean_mu_and_variance_exp_logvar():
    mu, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, -1.0]])
    z = dv.reparameterize(mu, logvar, randn(400_000, 2, dtype=torch.float32))
    assert torch.allclose(z.mean(0), mu[0], atol=0.01)
    assert torch.allclose(z.var(0), logvar[0].exp(), rtol=0.02)


def test_reparameterization_gradient_is_that_of_the_expectation():
    """d E[z^2] / d mu = 2 mu and d E[z^2] / d logvar = sigma^2, known integrals."""
    mu, logvar = torch.tensor([0.7], requires_grad=True), torch.tensor([0.4], requires_grad=True)
    eps = randn(400_000, 1, dtype=torch.float32)
    dv.reparameterize(mu, logvar, eps).square().mean().backward()
    assert torch.allclose(mu.grad, 2 * mu.detach(), rtol=0.02)
    assert torch.allclose(logvar.grad, logvar.detach().exp(), rtol=0.02)


@pytest.mark.parametrize('alpha', [1.0, 0.1])
def test_loss_is_the_negative_elbo_of_a_gaussian_decoder(alpha):
    """alpha = 2 sigma_x^2: loss = alpha (-log N(x; x_hat, sigma_x^2) + KL) + const, batch mean."""
    x, x_hat = randn(2, 4, 3, 5, 5, seed=1).sigmoid()
    mu, logvar = randn(2, 4, 6, seed=2)
    loss, squared_error, kl = dv.negative_elbo(x, x_hat, mu, logvar, alpha)
    sigma = (alpha / 2) ** 0.5
    log_p = Normal(x_hat, sigma).log_prob(x) - Normal(0.0, sigma).log_prob(torch.tensor(0.0))
    kl_torch = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0))
    bound = [alpha * (kl_torch[i].sum() - log_p[i].sum()) for i in range(4)]
    assert torch.allclose(loss, sum(bound) / 4)
    assert torch.allclose(squared_error + alpha * kl, loss)


def test_backbone_reads_the_shorthand():
    """Blocks, pooling, upsampling and width changes at the right places, 1x1 kernels at 1x1."""
    width = {8: 4, 4: 6, 1: 10}
    down, up = dv.backbone('8x2,8d2,8t4,4d4,4t1,1x1', width), dv.backbone('1u4,1t4,4u2,4t8', width)
    x = randn(2, 4, 8, 8, dtype=torch.float32)
    assert down(x).shape == (2, 10, 1, 1) and up(down(x)).shape == x.shape
    blocks = [m for m in down if isinstance(m, dv.VAEBlock)]
    assert [[c.kernel_size[0] for c in b.convs] for b in blocks] == [[1, 3, 3, 1]] * 4 + [[1] * 4]
    assert [b.convs[0].out_channels for b in blocks] == [2, 2, 2, 3, 5]
    assert all(not c.bias.any() for b in blocks for c in b.convs)
    assert all(m.bias is None for m in [*down, *up] if isinstance(m, nn.Conv2d))
    pooled = down[3](x)
    assert torch.allclose(pooled[0, 0, 0, 0], x[0, 0, :2, :2].mean())
    assert torch.equal(up[0](x)[..., :4, :4], x[..., :1, :1].expand(-1, -1, 4, 4))
    for bad in ('8y2', '8x', 'x2', ''):
        with pytest.raises(ValueError, match='none of'):
            dv.backbone(bad, width)


def test_vae_block_is_a_residual_of_gelu_then_convolution():
    block = dv.VAEBlock(4, 8)
    h = r = randn(2, 4, 8, 8, dtype=torch.float32)
    for conv in block.convs:
        r = conv(torch.nn.functional.gelu(r))
    assert torch.allclose(block(h), h + r)


def test_vae_maps_images_to_codes_and_back():
    vae = tiny().vae
    x = torch.rand(3, 1, 8, 8)
    mu, logvar = vae.encode(x)
    assert mu.shape == logvar.shape == (3, 4) and not torch.equal(mu, logvar)
    x_hat = vae.decode(mu)
    assert x_hat.shape == x.shape
    nn.init.constant_(vae.head.bias, 50.0)
    assert vae.decode(mu).max() <= 1
    nn.init.constant_(vae.head.bias, -50.0)
    assert vae.decode(mu).min() >= 0
    assert vae.mu.bias is None and vae.logvar.bias is None and vae.stem.bias is None
    eps = randn(3, 4, dtype=torch.float32)
    by_hand = dv.negative_elbo(x, vae.decode(mu + (logvar / 2).exp() * eps), mu, logvar)
    assert torch.allclose(vae(x, eps)[0], by_hand[0])


# 3. DIFFUSION -------------------------------------------------------------------------------------


def test_schedule():
    alpha_bar = dv.linear_schedule(T)
    beta, product = [1e-4 + (0.02 - 1e-4) * t / (T - 1) for t in range(T)], 1.0
    for t in range(T):
        product *= 1 - beta[t]
        assert abs(alpha_bar[t].item() / product - 1) < 1e-9
    assert alpha_bar.dtype == torch.float64 and dv.Diffusion(T).alpha_bar.dtype == torch.float32


def test_q_sample_agrees_with_noising_step_by_step():
    """Mean and variance after 300 steps y <- sqrt(1 - beta) y + sqrt(beta) noise."""
    y_0, t = 0.8, 299
    y = torch.full((50_000,), y_0, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    for beta in torch.linspace(1e-4, 0.02, T)[:t + 1]:
        y = (1 - beta) ** 0.5 * y + beta**0.5 * torch.randn(50_000, generator=g)
    at_once = dv.q_sample(torch.tensor(y_0), ALPHA_BAR[t], randn(50_000))
    assert abs(at_once.mean() - y.mean()) < 0.01
    assert abs(at_once.var() / y.var() - 1) < 0.03


def test_q_sample_noises_every_image_by_its_own_t():
    diffusion, seen = dv.Diffusion(T), {}

    def eps_theta(y, t):
        seen.update(y=y, t=t)
        return torch.zeros_like(y)

    x_0, eps, t = randn(3, 2, 4, 4, seed=1), randn(3, 2, 4, 4, seed=2), torch.tensor([0, 500, 999])
    loss = diffusion.loss(eps_theta, x_0, t, eps)
    for i in range(3):
        by_hand = ALPHA_BAR[t[i]].sqrt() * x_0[i] + (1 - ALPHA_BAR[t[i]]).sqrt() * eps[i]
        assert torch.allclose(seen['y'][i], by_hand, atol=1e-5)
    assert torch.equal(seen['t'], t) and torch.allclose(loss, eps.square().mean())


def test_predict_x0_inverts_q_sample():
    x_0, eps = randn(4, 5, seed=1), randn(4, 5, seed=2)
    for t in (0, 10, 500, 999):
        y = dv.q_sample(x_0, ALPHA_BAR[t], eps)
        assert torch.allclose(dv.predict_x0(y, ALPHA_BAR[t], eps), x_0)


@pytest.mark.parametrize('t, t_next', [(1, 0), (700, 699), (999, 998), (900, 400), (5, 0)])
def test_posterior_is_bayes_rule(t, t_next):
    """log q(y_t|y_next) + log q(y_next|x_0), on a fine grid of y_next, normalised numerically."""
    x_0, y_t = 0.3, -0.9
    a, b = ALPHA_BAR[t], ALPHA_BAR[t_next]
    mean, variance = dv.q_posterior(torch.tensor(x_0).double(), torch.tensor(y_t).double(), a, b)
    y = mean + variance.sqrt() * torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    beta = 1 - a / b
    if t_next == t - 1:
        assert abs(beta - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)[t]) < 1e-9
    log_density = (Normal((1 - beta).sqrt() * y, beta.sqrt()).log_prob(torch.tensor(y_t).double())
                   + Normal(b.sqrt() * x_0, (1 - b).sqrt()).log_prob(y))
    weight = log_density.softmax(0)
    assert abs((weight * y).sum() - mean) < 1e-6
    assert abs((weight * (y - mean) ** 2).sum() / variance - 1) < 1e-6


def test_change_of_variables():
    """Formulation 2's own forward chain, marginal and posterior are ours in y_t = x_t - x_hat."""
    x_0, x_hat, n = 0.6, 0.4, 100_000
    g = torch.Generator().manual_seed(0)
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    noise = lambda: torch.randn(n, generator=g, dtype=torch.float64)
    x = (1 - beta[0]).sqrt() * x_0 + x_hat + beta[0].sqrt() * noise()  # q(x_1|x_0, x_hat)
    for t in range(1, 200):  # q(x_t|x_t-1, x_hat)
        x = (1 - beta[t]).sqrt() * x + (1 - (1 - beta[t]).sqrt()) * x_hat + beta[t].sqrt() * noise()
    y = dv.q_sample(torch.tensor(x_0), ALPHA_BAR[199], noise())
    assert abs((y + x_hat).mean() - x.mean()) < 0.01 and abs(y.var() / x.var() - 1) < 0.03
    # posterior mean of Formulation 2: c_0 x_0 + c_t x_t + (1 - c_t) x_hat for t > 1; at t = 1: x_0
    for t in (1, 2, 500):
        x_t = torch.tensor(0.123, dtype=torch.float64)
        alpha, a, b = 1 - beta[t], ALPHA_BAR[t], ALPHA_BAR[t - 1]
        c_0, c_t = b.sqrt() * beta[t] / (1 - a), alpha.sqrt() * (1 - b) / (1 - a)
        theirs = c_0 * x_0 + c_t * x_t + (1 - c_t) * x_hat
        ours, _ = dv.q_posterior(x_0, x_t - x_hat, a, b)
        assert torch.allclose(ours + x_hat, theirs)
    last, variance = dv.q_posterior(torch.tensor(x_0), torch.tensor(9.0), ALPHA_BAR[0], 1.0)
    assert torch.allclose(last, torch.tensor(x_0).double().to(last.dtype)) and variance == 0


def test_formulation_2_sampled_in_x_agrees_with_ours_in_y():
    """The paper's own chain: from N(x_hat, I), posterior with (1 - c_t) x_hat, y_0 = x_0 last."""
    model = tiny('2', T=20)
    a = [*dv.linear_schedule(20).tolist()]
    z, start, noises = randn(2, 4).float(), randn(2, 1, 8, 8).float(), randn(20, 2, 1, 8, 8).float()
    with torch.no_grad():
        x_hat = 2 * model.vae.decode(z) - 1
        x = start + x_hat
        for i, t in enumerate(range(19, -1, -1)):
            eps = model.unet(torch.cat([x, x_hat], 1), torch.full((2,), t))
            if t == 0:
                x = ((x - x_hat - (1 - a[0]) ** 0.5 * eps) / a[0] ** 0.5).clamp(-1, 1)
                break
            x_0 = ((x - x_hat - (1 - a[t]) ** 0.5 * eps) / a[t] ** 0.5).clamp(-1, 1)
            beta = 1 - a[t] / a[t - 1]
            c_t = (1 - beta) ** 0.5 * (1 - a[t - 1]) / (1 - a[t])
            x = (a[t - 1] ** 0.5 * beta / (1 - a[t]) * x_0 + c_t * x + (1 - c_t) * x_hat
                 + (beta * (1 - a[t - 1]) / (1 - a[t])) ** 0.5 * noises[i])
    rest = iter(noises)
    draft, refined = generate(model, z, start, lambda: next(rest), steps=20, sampler='ddpm',
                                    spacing='uniform', sigma='small')
    assert torch.allclose(draft, (x_hat + 1) / 2)
    assert torch.allclose(refined, (x + 1) / 2, atol=1e-5)


@pytest.mark.parametrize('t, t_next', [(999, 998), (999, 300), (40, 3), (1, 0)])
def test_ddim_with_eta_1_is_the_ancestral_step_with_small_sigma(t, t_next):
    a, b = ALPHA_BAR[t].item(), ALPHA_BAR[t_next].item()
    y, x_0, noise = randn(3, 50)
    small, ddim = dv.ddpm_step(y, x_0, a, b, noise, 'small'), dv.ddim_step(y, x_0, a, b, noise, 1.0)
    assert torch.allclose(small, ddim)
    large = dv.ddpm_step(y, x_0, a, b, noise, 'large') - dv.ddpm_step(y, x_0, a, b, 0 * noise)
    assert torch.allclose(large, (1 - a / b) ** 0.5 * noise)


def test_last_step_adds_no_noise():
    y, x_0, noise = randn(3, 50)
    for step in (partial(dv.ddpm_step, sigma='large'), partial(dv.ddpm_step, sigma='small'),
                 partial(dv.ddim_step, eta=0.0), partial(dv.ddim_step, eta=1.0)):
        assert torch.allclose(step(y, x_0, ALPHA_BAR[30].item(), 1.0, 1e3 * noise), x_0)
    assert torch.equal(dv.dpmpp_step(y, x_0, ALPHA_BAR[30].item(), 1.0, (y, 0.1)), x_0)


SAMPLERS = [dict(sampler='ddpm', sigma='small'), dict(sampler='ddpm', sigma='large'),
            dict(sampler='ddim'), dict(sampler='ddim', eta=1.0), dict(sampler='dpm++')]


@pytest.mark.parametrize('how', SAMPLERS, ids=str)
def test_chain_ends_at_the_predicted_x_0_without_noise(how):
    """The last step goes to alpha_bar = 1: a network sure of x_0 = 0.3 makes exactly that."""
    sure = lambda y, t: (y - 0.3 * ALPHA_BAR[t[0]] ** 0.5) / (1 - ALPHA_BAR[t[0]]) ** 0.5
    noise = lambda: randn(2, 1, 4, 4)
    x_0 = dv.Diffusion(T).sample(sure, noise(), noise, steps=4, **how)
    assert (x_0 - 0.3).abs().max() < 1e-9


@pytest.mark.parametrize('how', SAMPLERS, ids=str)
@pytest.mark.parametrize('steps, spacing, tolerance', [
    (1000, 'uniform', 0.03), (250, 'uniform', 0.1), (250, 'quadratic', 0.1)])
def test_samplers_reproduce_a_known_gaussian(how, steps, spacing, tolerance):
    """x_0 ~ N(m, s^2) has the exact denoiser (y - sqrt(a) m) sqrt(1 - a) / (a s^2 + 1 - a)."""
    mean, s = 0.3, 0.1
    calls = []

    def exact(y, t):
        a = ALPHA_BAR[t[0]].item()
        calls.append(int(t[0]))
        return (y - a**0.5 * mean) * (1 - a) ** 0.5 / (a * s**2 + 1 - a)

    g = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(4000, 1, 1, 1, generator=g, dtype=torch.float64)
    if spacing == 'quadratic':  # starts at 0.8 T: give it the right variance there
        start = ALPHA_BAR[800]
        y_T = start.sqrt() * mean + (start * s**2 + 1 - start).sqrt() * noise()
    else:
        y_T = noise()
    x = dv.Diffusion(T).sample(exact, y_T, noise, steps, spacing=spacing, **how)
    assert len(calls) == steps == len(set(calls)) and calls == sorted(calls, reverse=True)
    assert abs(x.mean() - mean) < 0.01
    if how.get('sigma') == 'large' and steps < 1000:
        assert x.std() > 0.9 * s  # too much noise a step on a coarse grid: known, not an error
    else:
        assert abs(x.std() / s - 1) < tolerance + 0.02


def test_dpmpp_is_more_accurate_than_ddim_in_few_steps():
    """The exact ODE maps a quantile to the same quantile; second order comes closer to it."""
    mean, s = 0.2, 0.3

    def exact(y, t):
        a = ALPHA_BAR[t[0]].item()
        return (y - a**0.5 * mean) * (1 - a) ** 0.5 / (a * s**2 + 1 - a)

    a = ALPHA_BAR[-1].item()
    quantile = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64).view(7, 1, 1, 1)
    y_T = a**0.5 * mean + (a * s**2 + 1 - a) ** 0.5 * quantile
    error = {}
    for sampler in ('ddim', 'dpm++'):
        x = dv.Diffusion(T).sample(exact, y_T, lambda: 0, 50, sampler, 'uniform')
        error[sampler] = (x - mean - s * quantile).abs().max().item()
    assert error['dpm++'] < error['ddim'] / 2, error


def test_x_0_is_clipped_before_it_is_used_and_eps_follows():
    """An absurd network: every x_0 is clipped, so DDIM lands exactly on a noisy version of +-1."""
    y_T = randn(2, 1, 4, 4)
    seen = []

    def eps_theta(y, t):
        seen.append(y)
        return -1e4 * torch.ones_like(y)  # predicts x_0 = +infinity

    x = dv.Diffusion(T).sample(eps_theta, y_T, lambda: 0, 2, 'ddim', 'uniform')
    a, b = ALPHA_BAR[999].item(), ALPHA_BAR[499].item()
    eps = (y_T - a**0.5) / (1 - a) ** 0.5
    assert torch.allclose(seen[1], b**0.5 + (1 - b) ** 0.5 * eps)
    assert torch.equal(x, torch.ones_like(x))


def test_time_grids_for_every_number_of_steps():
    for total in (1, 2, 3, 10, 1000):
        for spacing in ('uniform', 'quadratic'):
            for n in range(1, total + 1):
                grid = dv.time_grid(total, n, spacing)
                assert len(grid) == n and sorted(set(grid), reverse=True) == grid
                assert 0 <= grid[-1] and grid[0] < total
                if spacing == 'uniform' or n == 1:
                    assert grid[0] == total - 1
    assert dv.time_grid(1000, 10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert dv.time_grid(1000, 5, 'quadratic') == [800, 450, 200, 50, 0]
    assert dv.time_grid(1000, 1000) == list(range(999, -1, -1))


def test_truncated_chain_starts_at_start():
    calls = []
    eps_theta = lambda y, t: calls.append(int(t[0])) or torch.zeros_like(y)
    dv.Diffusion(T).sample(eps_theta, randn(1, 1, 2, 2), lambda: 0, 4, spacing='uniform', start=4)
    assert calls == [3, 2, 1, 0]


# 4. U-NET -----------------------------------------------------------------------------------------


def test_time_embedding_by_hand():
    zero, t = dv.time_embedding(torch.tensor([0, 37]), 8)
    assert zero.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    angles = [37 * 10 ** (-4 * i / 4) for i in range(4)]
    by_hand = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    assert torch.allclose(t, torch.tensor(by_hand), atol=1e-5)


@pytest.mark.parametrize('heads', [1, 4])
def test_attention_agrees_with_a_loop_over_heads_and_pixels(heads):
    layer = dv.Attention(8, heads).double()
    nn.init.normal_(layer.out.weight)
    h = randn(2, 8, 3, 4)
    qkv = layer.qkv(layer.norm(h))
    q, k, v = qkv.flatten(2).chunk(3, dim=1)  # [2, 8, 12] each
    d, mixed = 8 // heads, torch.zeros(2, 8, 12, dtype=torch.float64)
    for b in range(2):
        for head in range(heads):
            rows = slice(head * d, (head + 1) * d)
            for i in range(12):
                score = torch.stack([q[b, rows, i] @ k[b, rows, j] for j in range(12)]) / d**0.5
                mixed[b, rows, i] = v[b, rows] @ score.softmax(0)
    assert torch.allclose(layer(h), h + layer.out(mixed.view(2, 8, 3, 4)))


def test_network_output_is_zero_at_the_start():
    """Zero-initialised: the head, and the last convolution of every block and attention."""
    net = dv.UNet(2, 1, 8, 8, [1, 2], 1, [4], heads=2)
    assert not net(torch.randn(2, 2, 8, 8), torch.tensor([3, 999])).any()
    for module in net.modules():
        if isinstance(module, dv.ResBlock):
            assert not module.conv2.weight.any() and not module.conv2.bias.any()
        if isinstance(module, dv.Attention):
            assert not module.out.weight.any() and not module.out.bias.any()


def test_res_block_by_hand():
    """GroupNorm, SiLU, conv; + Linear(SiLU(emb)); GroupNorm, SiLU, conv; skip by a 1x1 conv."""
    block = dv.ResBlock(8, 12, 6, groups=4).double()
    nn.init.normal_(block.conv2.weight)
    h, emb, silu = randn(2, 8, 4, 4, seed=1), randn(2, 6, seed=2), nn.functional.silu
    r = block.conv1(silu(block.norm1(h))) + block.emb(silu(emb))[:, :, None, None]
    assert torch.allclose(block(h, emb), block.skip(h) + block.conv2(silu(block.norm2(r))))
    assert block.skip.kernel_size == (1, 1)
    block = dv.ResBlock(8, 8, 6, groups=4, scale_shift=True).double()
    nn.init.normal_(block.conv2.weight)
    scale, shift = block.emb(silu(emb))[:, :, None, None].chunk(2, dim=1)
    r = block.norm2(block.conv1(silu(block.norm1(h)))) * (1 + scale) + shift
    assert torch.allclose(block(h, emb), h + block.conv2(silu(r)))


def test_group_norm_has_32_groups_at_the_papers_width_and_1_in_small_networks():
    """32 groups everywhere from 128 channels on; below, one, so that no mean colour is lost."""
    for channels, groups in ((128, 32), (160, 32), (24, 1), (64, 1)):
        with torch.device('meta'):
            net = dv.UNet(6, 3, 32, channels, [1, 2, 2], 1, [16], heads=8)
        norms = [m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)]
        assert set(norms) == {groups} and len(norms) == 2 * (3 + 2 + 6) + 4 + 1


def test_unet_layers_in_the_papers_order():
    """Skips after the stem, each block and each downsampling; attention only where asked for."""
    net = dv.UNet(6, 3, 32, 128, [1, 2, 2, 2], 2, [16], heads=8)
    blocks = lambda part: [layers[0] for layers in part if isinstance(layers[0], dv.ResBlock)]
    assert [b.conv1.in_channels for b in blocks(net.down)] == [128] * 3 + [256] * 5
    # Up, h and skip: 4x4 and 8x8 all 256 + 256; 16x16 takes the 128 of the first downsampling last.
    assert [b.conv1.in_channels for b in blocks(net.up)] == [512] * 8 + [384] + [384, 256, 256]
    attention = [m for m in net.modules() if isinstance(m, dv.Attention)]
    assert len(attention) == 2 + 3 + 1 and all(a.heads == 8 for a in attention)
    assert sum(isinstance(m, nn.Upsample) for m in net.modules()) == 3
    assert sum(m.stride == (2, 2) for m in net.modules() if isinstance(m, nn.Conv2d)) == 3
    seen = []
    for a in attention:
        a.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    with torch.no_grad():
        net(torch.zeros(1, 6, 32, 32), torch.tensor([0]))
    assert seen == [16, 16, 4, 16, 16, 16]


def test_dropout_only_in_training():
    net = tiny('uncond', dropout=0.5).unet
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 6])
    assert not torch.equal(net.train()(x, t), net(x, t))
    assert torch.equal(net.eval()(x, t), net(x, t))


def test_network_sees_t_and_z():
    net = tiny('1', z_cond=True).unet
    x, t, z = torch.randn(1, 2, 8, 8), torch.tensor([5]), torch.randn(1, 4)
    out = net(x, t, z)
    assert not torch.equal(out, net(x, t + 400, z)) and not torch.equal(out, net(x, t, z + 1))


def test_head_and_output_are_float32_when_the_trunk_is_bfloat16():
    net, seen = tiny('uncond', bf16=True).unet, []
    net.head.register_forward_hook(lambda m, inputs, out: seen.append((inputs[0].dtype, out.dtype)))
    net.stem.register_forward_hook(lambda m, inputs, out: seen.append(out.dtype))
    net(torch.randn(1, 1, 8, 8), torch.tensor([5]))
    assert seen == [torch.bfloat16, (torch.float32, torch.float32)]


COUNTS = dict(cifar10=(9_243_107, 35_749_763, 35_746_307),
              celeba64=(14_011_907, 82_644_099, 82_640_643),
              celebahq128=(21_098_275, 95_167_747, 95_164_291),
              celebahq256=(32_632_579, 113_676_675, 113_673_219))
WITH_Z = dict(celeba64=87_306_243, celebahq128=100_420_355, celebahq256=119_585_923)


@pytest.mark.parametrize('preset', COUNTS)
def test_presets_have_the_papers_sizes_and_run(preset):
    """Exact parameter counts; a training step of both stages and a sampling call on `meta`."""
    given = dict(preset=preset, data='folder') if 'hq' in preset else dict(preset=preset)
    with torch.device('meta'):
        models = {form: dv_build_on_meta(config(2, form=form, **given)) for form in ('1', 'uncond')}
        with_z = dv_build_on_meta(config(2, form='2', z_cond=True, **given))
    networks = models['1'].vae, models['1'].unet, models['uncond'].unet
    assert tuple(map(count, networks)) == COUNTS[preset]
    assert count(with_z.unet) == WITH_Z.get(preset, count(with_z.unet))
    train_and_sample_on_meta(models['1'])
    vae = models['1'].vae.requires_grad_(True)
    loss = vae(torch.rand(2, *models['1'].image_shape, device='meta'),
               torch.randn(2, vae.z_dim, device='meta'))[0]
    loss.backward()
    assert all(p.grad.device.type == 'meta' for p in vae.parameters())


def dv_build_on_meta(c):
    """Like dv.build, but without the memory."""
    channels = 1 if c.data in dv.GREY else 3
    vae = dv.VAE(channels, c.size, c.encoder, c.decoder, c.width) if c.form != 'uncond' else None
    net = dv.UNet(channels * (2 if vae else 1), channels, c.size, c.channels, c.multipliers,
                  c.blocks, c.attention, c.heads, c.dropout, vae.z_dim if c.z_cond else 0)
    with torch.device('cpu'):
        diffusion = dv.Diffusion(c.timesteps)
    return dv.DiffuseVAE(vae, net, diffusion.to('meta'), c.form, (channels, c.size, c.size))


def train_and_sample_on_meta(model):
    """No tensor of a step is anywhere but on `meta`."""
    noise = [tensor.to('meta') for tensor in model.noise(2, dv.generator(0))]
    loss, = model(torch.rand(2, *model.image_shape, device='meta'), *noise)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.Adam(trained).step()
    assert loss.device.type == 'meta' and all(p.grad.device.type == 'meta' for p in trained)
    z = torch.randn(2, model.vae.z_dim, device='meta') if model.vae else None
    y_T = torch.randn(2, *model.image_shape, device='meta')
    _, refined = generate(model, z, y_T, lambda: torch.randn_like(y_T), steps=1, sampler='ddpm')
    assert refined.device.type == 'meta' and refined.shape == y_T.shape


@pytest.mark.parametrize('form, z_cond', [('1', True), ('2', False), ('uncond', False)])
def test_no_tensor_on_the_wrong_device(form, z_cond):
    """Every form, with z and without, with every sampler, entirely on `meta`."""
    model = tiny(form, z_cond).to('meta')
    train_and_sample_on_meta(model)
    for how in SAMPLERS:
        y_T = torch.randn(2, *model.image_shape, device='meta')
        z = torch.randn(2, 4, device='meta')
        _, refined = generate(model, z, y_T, lambda: torch.randn_like(y_T), steps=3, **how)
        assert refined.device.type == 'meta'


def test_other_counts_of_the_paper():
    """CIFAR-10 without attention beside the middle, with z, and the large network."""
    with torch.device('meta'):
        net = lambda **more: count(dv.UNet(6, 3, 32, **dict(channels=128, multipliers=[1, 2, 2, 2],
                                                            blocks=2, heads=8) | more))
        assert net() == 34_431_363 and net(z_dim=512) == 37_517_571
        assert net(channels=160, blocks=3) == 70_875_203
        c = config(2, preset='cifar10')
        vae = dv.VAE(3, 32, c.encoder, c.decoder, c.width)
    assert count(vae.decoder) + count(vae.head) == 3_412_579


def test_preset_settings():
    """The numbers of the paper's training, as section 4 of the brief gives them."""
    c = config(2, preset='cifar10')
    assert (c.lr, c.warmup, c.clip, c.ema, c.flip) == (2e-4, 5000, 1.0, 0.9999, True)
    assert (c.batch, c.heads, c.dropout, c.steps) == (256, 8, 0.3, 556_640)
    c = config(1, preset='cifar10')
    assert (c.lr, c.batch, c.steps, c.flip) == (1e-4, 128, 195_312, False)
    assert (c.ema, c.clip, c.alpha) == (0, math.inf, 1.0)
    c = config(2, preset='celebahq256', data='x')
    assert (c.lr, c.dropout, c.batch, c.size, c.steps) == (2e-5, 0.1, 64, 256, 468_750)
    assert config(1, preset='celebahq128', data='x').flip and not config(1, preset='celeba64').flip
    assert config(2, preset='cifar10', channels=160, blocks=3).channels == 160


def test_cifar10_preset_trains_for_real():
    """One step of both stages and one sampling call at the paper's size, batch 2."""
    c = config(2, preset='cifar10', precision='float32')
    model = dv.build(c)
    vae_loss, *_ = model.vae(torch.rand(2, 3, 32, 32), torch.randn(2, 512))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=c.lr)
    loss, = model(torch.rand(2, 3, 32, 32), *model.noise(2, dv.generator(0)))
    loss.backward()
    optimizer.step()
    _, refined = generate(model, torch.randn(1, 512), torch.randn(1, 3, 32, 32), lambda: 0, steps=1)
    assert vae_loss.isfinite() and abs(loss - 1) < 0.1 and refined.shape == (1, 3, 32, 32)


# 5. THE TWO-STAGE MODEL ---------------------------------------------------------------------------


def test_what_the_network_is_shown():
    """Formulation 1: [x_t, x_hat]; 2: [y_t + x_hat, x_hat]; the baseline: x_t alone."""
    for form in ('1', '2', 'uncond'):
        model, seen = tiny(form), []
        model.unet.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        y_t, x_hat = torch.randn(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
        model.eps_theta(y_t, torch.tensor([3, 4]), x_hat, None)
        shown = {'1': [y_t, x_hat], '2': [y_t + x_hat, x_hat], 'uncond': [y_t]}[form]
        assert torch.equal(seen[0], torch.cat(shown, 1))


@pytest.mark.parametrize('form', ['1', '2'])
def test_stage_2_trains_on_the_reconstruction_from_a_sampled_z(form):
    """x_hat = 2 f(mu + sigma eps_z) - 1 of the same image; x_0 = 2 x - 1; the loss by hand."""
    model = tiny(form)
    x, t = torch.rand(2, 1, 8, 8), torch.tensor([100, 900])
    eps, eps_z = torch.randn(2, 1, 8, 8), torch.randn(2, 4)
    mu, logvar = model.vae.encode(x)
    x_hat = 2 * model.vae.decode(mu + (logvar / 2).exp() * eps_z) - 1
    a = ALPHA_BAR[t].float().view(2, 1, 1, 1)
    x_t = a.sqrt() * (2 * x - 1) + (1 - a).sqrt() * eps + (x_hat if form == '2' else 0)
    by_hand = (model.unet(torch.cat([x_t, x_hat], 1), t) - eps).square().mean()
    assert torch.allclose(model(x, eps_z, t, eps, torch.ones(2))[0], by_hand, atol=1e-6)


def test_stage_2_leaves_the_vae_untouched():
    model = tiny('1').train()
    assert model.unet.training and not any(module.training for module in model.vae.modules())
    before = {name: p.clone() for name, p in model.vae.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        model(torch.rand(4, 1, 8, 8), *model.noise(4, dv.generator(step)))[0].backward()
        optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in model.vae.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.vae.state_dict().items())


def test_training_times_are_uniform():
    """Every index 0 ... T - 1 is drawn with the same frequency, whatever the batch."""
    model = tiny('1', T=10)
    t = torch.cat([model.noise(7, dv.generator(i))[1] for i in range(3000)])
    frequency = torch.bincount(t, minlength=10) / len(t)
    assert len(frequency) == 10 and (frequency - 0.1).abs().max() < 0.006


def test_each_image_is_generated_from_its_own_z():
    """Neither batch mates nor the order matter: no statistic is taken over the batch."""
    model = tiny('2', z_cond=True).eval()
    z, y_T = torch.randn(3, 4), torch.randn(3, 1, 8, 8)
    how = dict(noise=lambda: 0, steps=4, sampler='ddim')
    together, alone = generate(model, z, y_T, **how), generate(model, z[1:2], y_T[1:2], **how)
    assert all(torch.allclose(a[1:2], b, atol=1e-5) for a, b in zip(together, alone))
    assert not torch.equal(generate(model, z + 1, y_T, **how)[1], together[1])


# 7. TRAINING --------------------------------------------------------------------------------------


def test_ema_is_the_mean_at_first_and_exponential_later():
    """d_n = min(decay, (1 + n) / (10 + n)), by an independent loop of numbers."""
    average, value, parameter = [torch.zeros(1)], 0.0, torch.zeros(1)
    for n in range(300):
        parameter.fill_(math.sin(n))
        dv.ema_update(average, [parameter], n, 0.95)
        d = 0.95 if (1 + n) / (10 + n) > 0.95 else (1 + n) / (10 + n)
        value = value * d + math.sin(n) * (1 - d)
        assert abs(average[0].item() - value) < 1e-5
    dv.ema_update(average, [parameter], 300, 0.0)
    assert torch.equal(average[0], parameter)


def run(*args):
    """diffusevae.main in process: the exit code."""
    return dv.main([str(arg) for arg in args])


SMALL = ['--channels', 4, '--multipliers', '1', '--heads', 1, '--batch', 4]
SMALL += ['--precision', 'float32']
NARROW = ['--width', '32:4,16:4,8:4,4:4,1:4', '--batch', 4]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A tiny run of both stages and all forms on shapes."""
    out = tmp_path_factory.mktemp('run')
    assert run('train', '--stage', 1, '--out', out, '--steps', 12, *NARROW) == 0
    for form in ('1', '2', 'uncond'):
        assert run('train', '--stage', 2, '--form', form, '--out', out, '--steps', 12, *SMALL) == 0
    return out


def test_training_writes_checkpoint_table_and_picture(trained):
    for name, metrics in (('stage1', ['loss', 'squared_error', 'kl']), ('stage2-form1', ['loss'])):
        rows = list(csv.DictReader((trained / f'{name}.csv').open()))
        assert list(rows[0]) == ['step', *metrics, 'lr', 'images_per_s']
        assert [row['step'] for row in rows] == ['10', '12']
        assert Image.open(trained / f'{name}.png').width > 500
    saved = torch.load(trained / 'stage2-form2.pt', weights_only=True)
    first = torch.load(trained / 'stage1.pt', weights_only=True)
    averaged = first['model'] | first['ema']
    assert all(torch.equal(saved['model'][f'vae.{k}'], v) for k, v in averaged.items())
    assert not torch.equal(averaged['stem.weight'], first['model']['stem.weight'])
    assert saved['config']['width'] == first['config']['width'] and saved['config']['form'] == '2'
    assert set(saved['ema']) == {k for k in saved['model'] if k.startswith('unet.')}
    assert not torch.equal(saved['ema']['unet.stem.weight'], saved['model']['unet.stem.weight'])


def contents(path):
    """Everything of a checkpoint that must not depend on interruptions."""
    saved = torch.load(path, weights_only=True)
    saved['rows'] = [row[:-1] for row in saved['rows']]  # images/s is a clock's
    flat = {}

    def walk(name, value):
        if isinstance(value, dict):
            for key in value:
                walk(f'{name}/{key}', value[key])
        else:
            flat[name] = value.tolist() if isinstance(value, torch.Tensor) else value

    walk('', {k: saved[k] for k in ('model', 'ema', 'optimizer', 'rows', 'step')})
    return flat


@pytest.mark.parametrize('stage', [1, 2])
def test_resumed_training_is_bit_identical(trained, tmp_path, stage):
    """20 steps at once, and 10 + 10 with dropout, flips, EMA and clipping on."""
    options = [*NARROW, '--flip'] if stage == 1 else [*SMALL, '--dropout', 0.3]
    for name, parts in (('whole', [20]), ('parts', [10, 20])):
        (tmp_path / name).mkdir()
        shutil.copy(trained / 'stage1.pt', tmp_path / name) if stage == 2 else None
        for steps in parts:
            command = ['train', '--stage', stage, '--out', tmp_path / name, '--steps', steps]
            assert run(*command, *options) == 0
    name = 'stage1.pt' if stage == 1 else 'stage2-form1.pt'
    assert contents(tmp_path / 'whole' / name) == contents(tmp_path / 'parts' / name)


def test_precision_is_kept_on_resume_whatever_the_device_declares(tmp_path, monkeypatch):
    """A run in bfloat16 trains and samples, and stays so where float32 would be chosen."""
    command = ['train', '--stage', 2, '--form', 'uncond', '--out', tmp_path, *SMALL[:-2]]
    for steps, fast in ((2, 'bfloat16'), (4, 'float32')):
        monkeypatch.setattr(dv, 'choose_device', lambda name: (torch.device('cpu'), fast))
        assert run(*command, '--steps', steps) == 0
    saved = torch.load(tmp_path / 'stage2-uncond.pt', weights_only=True)
    assert saved['config']['precision'] == 'bfloat16' and saved['step'] == 4
    assert run('sample', '--out', tmp_path, '--steps', 2, '--num', 2) == 0


def test_every_step_draws_its_own_noise(tmp_path, monkeypatch):
    """All steps and seeds differ, and step s of one seed repeats: a function of (seed, s) alone."""
    drawn = []
    noise = dv.VAE.noise
    monkeypatch.setattr(dv.VAE, 'noise',
                        lambda self, n, g: drawn.append(noise(self, n, g)) or drawn[-1])
    for i, seed in enumerate((0, 0, 1)):
        command = ['train', '--stage', 1, '--steps', 3, '--seed', seed, '--out', tmp_path / str(i)]
        assert run(*command, *NARROW) == 0
    steps = [eps for eps, in drawn if len(eps) == 4]  # `build` tries the network with 2 images
    assert len(steps) == 9 and all(map(torch.equal, steps[:3], steps[3:6]))
    different = [*steps[:3], *steps[6:]]
    assert not any(torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])


def test_vae_of_a_mostly_black_set_does_not_die(tmp_path):
    """The decoder starts at the mean pixel: from 0.5 the sigmoid would be driven flat."""
    root, out = mnist_files(tmp_path), tmp_path / 'out'
    command = ['train', '--stage', 1, '--data', 'mnist', '--root', root, '--out', out]
    assert run(*command, '--steps', 1, '--lr', 0, *NARROW) == 0
    bias = torch.load(out / 'stage1.pt', weights_only=True)['model']['head.bias']
    assert torch.allclose(bias.sigmoid(), dv.load_images('mnist', root).batch(range(40)).mean())


def test_resume_finish_extend_contradict(trained, capsys):
    path = trained / 'stage2-uncond.pt'
    before = path.read_bytes()
    base = ['train', '--stage', 2, '--form', 'uncond', '--out', trained]
    assert run(*base) == 0 and 'complete' in capsys.readouterr().out
    assert run(*base, '--lr', 0.5) == 2
    message = capsys.readouterr().err
    assert '0.5' in message and '0.002' in message and message.count('\n') == 1
    assert run(*base, '--data', 'mnist') == 2 and 'shapes' in capsys.readouterr().err
    assert run(*base, '--steps', 5) == 2 and '12' in capsys.readouterr().err
    assert path.read_bytes() == before


def test_stage_2_inherits_from_stage_1(trained, capsys):
    assert run('train', '--stage', 2, '--form', '2', '--out', trained, '--data', 'mnist') == 2
    assert 'shapes' in capsys.readouterr().err
    config = torch.load(trained / 'stage2-uncond.pt', weights_only=True)['config']
    assert config['data'] == 'shapes' and config['width'] == {32: 4, 16: 4, 8: 4, 4: 4, 1: 4}


def test_training_images_are_mirrored_left_to_right(tmp_path, monkeypatch):
    """One picture, red on the left and black below: half of the batches' images have it right."""
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    pixels[:, 0, :20, :16] = 255
    seen, forward = [], dv.DiffuseVAE.forward
    monkeypatch.setattr(dv, 'load_images', lambda *where, **more: dv.Images(pixels))
    monkeypatch.setattr(dv.DiffuseVAE, 'forward',
                        lambda model, x, *noise: seen.append(x) or forward(model, x, *noise))
    run('train', '--stage', 2, '--form', 'uncond', '--steps', 2, '--out', tmp_path / 'o', *SMALL)
    x = torch.cat([x for x in seen if not x.is_meta])
    left, right = pixels[0] / 255, pixels[0].flip(2) / 255
    mirrored = [torch.equal(image, right) for image in x]
    assert all(torch.equal(image, right if m else left) for image, m in zip(x, mirrored))
    assert 0 < sum(mirrored) < len(x)


def test_loss_that_is_not_finite_stops_training(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dv, 'negative_elbo', lambda x, x_hat, *rest: (x_hat.sum() * math.nan,) * 3)
    assert run('train', '--stage', 1, '--out', tmp_path, '--steps', 12, *NARROW) == 2
    assert 'nan' in capsys.readouterr().err and not (tmp_path / 'stage1.pt').exists()


# 8. SAMPLING --------------------------------------------------------------------------------------


def load(out, form):
    saved = torch.load(out / f'stage2-{form}.pt', weights_only=True)
    model = dv.build(dv.Config(**saved['config']))
    model.load_state_dict(saved['model'] | saved['ema'])
    return model.eval()


def test_samples_do_not_depend_on_their_number(trained):
    """Image i of a chunk is the same whatever --num is; the next chunk is another."""
    model, options = load(trained, 'form1'), dv.Sampling(steps=2)
    few, many = (dv.sample_chunk(model, options, 0, n) for n in (3, 9))
    assert list(few) == ['draft', 'refined']
    assert all(torch.allclose(few[name], many[name][:3], atol=1e-5) for name in few)
    assert not torch.allclose(dv.sample_chunk(model, options, 1, 3)['draft'], few['draft'])


def test_shared_noise_leaves_z_as_the_only_difference():
    model = tiny('1', T=10)
    model.vae.decode = lambda z: torch.full((len(z), 1, 8, 8), 0.5)  # as if all z were equal
    for sampler, eta in (('ddpm', 0.0), ('ddim', 1.0)):
        options = dv.Sampling(steps=5, sampler=sampler, eta=eta, shared_noise=True)
        a = dv.sample_chunk(model, options, 0, 3)['refined']
        b = dv.sample_chunk(model, options, 1, 3)['refined']
        assert torch.allclose(a, a[:1].expand_as(a)) and torch.allclose(a, b)
        options.shared_noise = False
        a = dv.sample_chunk(model, options, 0, 3)['refined']
        assert not torch.allclose(a[0], a[1])


def test_temperature_scales_y_T():
    model, seen = tiny('2', T=10), []
    model.unet.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for temperature in (1.0, 0.5):
        dv.sample_chunk(model, dv.Sampling(steps=1, temperature=temperature), 0, 2)
    y_1, y_half = (x[:, :1] - x[:, 1:] for x in seen)  # Formulation 2 is shown [y_t + x_hat, x_hat]
    assert torch.allclose(0.5 * y_1, y_half, atol=1e-5)


def test_sample_uses_the_averaged_weights(trained, tmp_path):
    """With the average replaced by zeros, the same command gives another picture."""
    assert run('sample', '--out', trained, '--steps', 2, '--num', 4) == 0
    shutil.copytree(trained, tmp_path / 'copy')
    path = tmp_path / 'copy' / 'stage2-form1.pt'
    saved = torch.load(path, weights_only=True)
    saved['ema'] = {k: torch.ones_like(v) for k, v in saved['ema'].items()}
    torch.save(saved, path)
    assert run('sample', '--out', tmp_path / 'copy', '--steps', 2, '--num', 4) == 0
    name = 'samples-form1.png'
    assert (trained / name).read_bytes() != (tmp_path / 'copy' / name).read_bytes()


def test_grid_has_each_draft_above_its_refined_image(trained):
    assert run('sample', '--out', trained, '--form', '2', '--steps', 2, '--num', 20) == 0
    grid = Image.open(trained / 'samples-form2.png')
    assert grid.size == (64 + 2 * (16 * 33 + 1), 2 * (4 * 33 + 1))
    model = load(trained, 'form2')
    drafts, refined = dv.sample_chunk(model, dv.Sampling(steps=2), 0, 20).values()
    place = lambda i: 2 * (i * 33 + 17)
    pixel = lambda row, column: torch.tensor(grid.getpixel((64 + place(column), place(row))))
    for row, images, i in ((0, drafts, 5), (1, refined, 5), (2, drafts, 18), (3, refined, 18)):
        expected = (255 * images[i, :, 16, 16]).round().clamp(0, 255)
        assert (pixel(row, i % 16) - expected).abs().max() <= 1


def test_png_folder_is_restartable_and_refuses_other_settings(trained, tmp_path, capsys):
    command = ['sample', '--out', trained, '--steps', 2, '--num', 66, '--png', tmp_path / 'p']
    assert run(*command) == 0
    files = sorted((tmp_path / 'p').glob('*/*.png'))
    assert len(files) == 132 and files[0].name == '000000.png'
    first = {path: path.read_bytes() for path in files}
    files[65].unlink()  # drafts/000065.png, in the second chunk
    stamp = files[0].stat().st_mtime_ns
    assert run(*command) == 0
    assert {path: path.read_bytes() for path in files} == first
    assert files[0].stat().st_mtime_ns == stamp
    assert run(*command, '--seed', 1) == 2 and 'seed' in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files} == first
    command = ['sample', '--out', trained, '--real', '--num', 3, '--png', tmp_path / 'real']
    assert run(*command) == 0
    known = {x.numpy().tobytes() for x in dv.load_images('shapes').pixels}
    for path in (tmp_path / 'real' / 'real').glob('*.png'):
        pixels = dv.pil_to_tensor(Image.open(path))
        assert pixels.numpy().tobytes() in known


def test_pixels_are_rounded_not_truncated():
    x = torch.tensor([[[[0.999, 0.5, 1.7, -1.0]]]])
    assert dv.to_uint8(x, 'shapes').flatten().tolist() == [255, 128, 255, 0]


# 9. EXPERIMENTS -----------------------------------------------------------------------------------


def test_distance_is_small_for_equal_sets_and_grows_with_every_damage():
    """Blur, speckle, hue shift, loss of contrast: each step more is farther; halves are near."""
    images = dv.load_images('shapes', train=False).batch(range(400))
    real, ours = images[:200], images[200:]
    distance = lambda x: dv.sliced_wasserstein(x, real).mean().item()
    floor = distance(ours)
    assert dv.sliced_wasserstein(real, real).max() == 0
    noise = randn(*ours.shape).float()
    blur = lambda x, k: x if k == 1 else nn.functional.avg_pool2d(
        nn.functional.pad(x, [k // 2] * 4, 'replicate'), k, stride=1)
    turned = lambda x, w: (1 - w) * x + w * x.roll(1, dims=1)  # red to green to blue
    damages = dict(blur=[blur(ours, k) for k in (3, 5, 7)],
                   speckle=[ours + s * noise for s in (0.05, 0.1, 0.2)],
                   hue=[turned(ours, w) for w in (0.15, 0.3, 0.45)],
                   contrast=[0.5 + s * (ours - 0.5) for s in (0.85, 0.7, 0.5)])
    for name, damaged in damages.items():
        steps = [floor, *map(distance, damaged)]
        assert steps == sorted(steps) and steps[-1] > 1.5 * floor, (name, steps)
    assert len(dv.sliced_wasserstein(ours, real)) == 3  # 32, 16, 8


def test_distance_against_sorted_numbers_by_hand():
    """Every patch shifted by one standard deviation of the real set, level by level."""
    real = randn(300, 1, 8, 8).float()
    std = real.std()
    g = dv.generator('sliced Wasserstein')
    torch.randint(4, (300, 1, 64), generator=g)
    direction = nn.functional.normalize(torch.randn(49, 128, generator=g), dim=0)
    shift = direction.sum(0).abs().mean()  # (1, ..., 1) along each direction
    assert torch.allclose(dv.sliced_wasserstein(real + std, real)[0], 1000 * shift, rtol=1e-3)


def test_pyramid_adds_up_and_its_finest_level_is_the_finest_detail():
    x = torch.rand(2, 3, 32, 32)
    levels = dv.laplacian_pyramid(x)
    assert [level.shape[-1] for level in levels] == [32, 16, 8]
    again = levels[-1]
    for level in levels[-2::-1]:
        again = level + nn.functional.interpolate(again, scale_factor=2, mode='bilinear')
    assert torch.allclose(again, x, atol=1e-6)
    flat = dv.laplacian_pyramid(torch.full((1, 1, 32, 32), 0.3))
    assert flat[0].abs().max() < 1e-6 and torch.allclose(flat[-1], torch.tensor(0.3))


def spd(k, d, seed):
    """k random covariances."""
    a = randn(k, d, d, seed=seed)
    return a @ a.mT + 0.5 * torch.eye(d, dtype=torch.float64)


def test_mixture_of_groups_far_apart_is_mean_and_covariance_of_each():
    group = torch.arange(60) % 3
    z = randn(60, 3) + 100 * torch.eye(3).double()[group]
    (weights, means, covariances), _ = dv.fit_mixture(z, 3, dv.generator(0), ridge=0.0)
    (_, _, ridged), _ = dv.fit_mixture(z, 3, dv.generator(0), ridge=0.1)
    for k in range(3):
        i, part = means[:, k].argmax(), z[group == k]
        assert torch.allclose(weights[i], torch.tensor(1 / 3).double())
        assert torch.allclose(means[i], part.mean(0))
        assert torch.allclose(covariances[i], part.T.cov(correction=0))
        assert torch.allclose(ridged[i] - covariances[i], 0.1 * torch.eye(3).double())


def test_mixture_recovers_a_known_one_and_its_likelihood_never_falls():
    means = torch.tensor([[0.0, 4.0], [4.0, 0.0], [-4.0, -4.0]]).double()
    covariances, share = spd(3, 2, 5) / 4, torch.tensor([0.5, 0.3, 0.2]).double()
    k = torch.multinomial(share, 6000, True, generator=torch.Generator().manual_seed(1))
    z = means[k] + (torch.linalg.cholesky(covariances)[k] @ randn(6000, 2, 1))[..., 0]
    mixture, likelihoods = dv.fit_mixture(z, 3, dv.generator(2), ridge=0.0)
    order = [(mixture[1] - m).square().sum(1).argmin().item() for m in means]
    assert sorted(order) == [0, 1, 2]
    for found, truth, tolerance in zip(mixture, (share, means, covariances), (0.03, 0.1, 0.15)):
        assert torch.allclose(found[order], truth, atol=tolerance)
    assert all(b >= a - 1e-12 for a, b in zip(likelihoods, likelihoods[1:]))
    torchs = MixtureSameFamily(Categorical(mixture[0]), MultivariateNormal(*mixture[1:]))
    assert likelihoods[-1] == pytest.approx(torchs.log_prob(z).mean().item(), abs=1e-9)
    one, _ = dv.fit_mixture(z, 1, dv.generator(2), ridge=0.0)
    assert torch.allclose(one[1][0], z.mean(0)) and torch.allclose(one[2][0], z.T.cov(correction=0))


LEVELS = torch.arange(256).double() * 2 / 255 - 1


class Denoiser:
    """A model whose eps_theta implies a given x_0(y_t, alpha_bar_t, x_hat)."""
    def __init__(self, x_0, alpha_bar=ALPHA_BAR, vae=None):
        self.x_0, self.vae, self.diffusion = x_0, vae, dv.Diffusion(2)
        self.diffusion.schedule = alpha_bar.tolist()

    def eps_theta(self, y_t, t, x_hat, z):
        a = torch.tensor(self.diffusion.schedule, dtype=torch.float64)[t].view(-1, 1, 1, 1)
        return (y_t - a.sqrt() * self.x_0(y_t.double(), a, x_hat)) / (1 - a).sqrt()


@pytest.mark.parametrize('sigma', ['small', 'large'])
def test_bound_term_by_term_for_a_denoiser_that_always_says_the_same(sigma):
    """x_0 = 0.98 whatever y_t: no term depends on the noise, and each is a sum by hand."""
    x = torch.tensor([0, 240, 250, 253, 255]).view(5, 1, 1, 1) / 255
    asked = []
    guess = lambda y, a, x_hat: asked.append(a[0].item()) or torch.full_like(y, 0.98)
    terms = dv.bound(Denoiser(guess), x, dv.generator(0), sigma, strata=T - 1)
    assert asked == [*ALPHA_BAR[1:].tolist(), ALPHA_BAR[0].item()]  # each t once, then the decoder
    x_0 = 2 * x.double() - 1
    start = kl_divergence(Normal(ALPHA_BAR[-1].sqrt() * x_0, (1 - ALPHA_BAR[-1]).sqrt()),
                          Normal(0.0, torch.ones(1).double()))
    chain = 0
    for a, b in zip(ALPHA_BAR[1:], ALPHA_BAR):
        beta = 1 - a / b
        tilde = beta * (1 - b) / (1 - a)
        weight = b.sqrt() * beta / (1 - a)
        chain += kl_divergence(Normal(weight * x_0, tilde.sqrt()),
                               Normal(weight * 0.98, (tilde if sigma == 'small' else beta).sqrt()))
    beta_2 = 1 - ALPHA_BAR[1] / ALPHA_BAR[0]
    decoder = Normal(torch.tensor(0.98).double(),
                     (beta_2 * (1 - ALPHA_BAR[0]) / (1 - ALPHA_BAR[1])).sqrt())
    high = decoder.cdf(x_0 + 1 / 255).where(x < 1, 1.0)
    low = decoder.cdf(x_0 - 1 / 255).where(x > 0, 0.0)
    mass = -(high - low).log().flatten()
    assert torch.allclose(terms['L_T'], start.flatten(), rtol=1e-6)
    assert torch.allclose(terms['chain'], chain.flatten(), rtol=1e-5)
    assert torch.allclose(terms['decoder'][2:], mass[2:], rtol=1e-4)
    far = (0.98 - x_0.flatten()[:2] - 1 / 255) / decoder.scale  # log Phi(-far), by its asymptote
    assert torch.allclose(terms['decoder'][:2], far**2 / 2 + (far * math.sqrt(2 * math.pi)).log(),
                          rtol=1e-3)


class TwoMeans:
    """A VAE with one code, the sign z = +-3 of the image's mean, and the drafts 0.4 and 0.6."""

    def encode(self, x):
        mu = 3 * (x.mean((1, 2, 3)) - 0.5).sign()[:, None]
        return mu, torch.full_like(mu, -40.0)

    def decode(self, z):
        return (0.5 + 0.1 * z.sign()[:, :, None, None]).expand(-1, 1, 4, 4)


@pytest.mark.parametrize('sigma', ['small', 'large'])
@pytest.mark.parametrize('with_draft', [False, True])
def test_bound_is_just_above_the_exact_value(sigma, with_draft):
    """Pixels N(m, 0.1^2) in 256 levels, the exact E[x_0|y_t] as denoiser: at most 0.05 bits/dim
    above -log2 p(x_0|x_hat), never below. The steps are small enough for either variance."""
    n, s = 32, 0.1
    m = (0.2 if with_draft else 0.0) * (-1.0) ** torch.arange(n).view(n, 1, 1, 1).double()
    noised = torch.logspace(math.log10(6e-7), math.log10(1 - 4e-5), 2000, dtype=torch.float64)
    log_p = lambda m: (-(LEVELS - m[..., None])**2 / (2 * s**2)).log_softmax(-1)

    def x_0(y, a, x_hat):
        mean = torch.zeros(1, 1, 1, 1) if x_hat is None else x_hat[:, :, :1, :1]
        near = (LEVELS.abs() < 0.7)  # the others have probabilities below 1e-6
        weight = log_p(mean)[..., near] - ((y[..., None] - a.sqrt()[..., None] * LEVELS[near])**2
                                           / (2 * (1 - a[..., None])))
        return weight.softmax(-1) @ LEVELS[near]

    p = log_p(m.expand(n, 1, 4, 4))
    level = torch.multinomial(p.exp().view(-1, 256), 1,
                              generator=torch.Generator().manual_seed(3)).view(n, 1, 4, 4)
    exact = -p.gather(-1, level[..., None]).sum((1, 2, 3, 4))
    model = Denoiser(x_0, 1 - noised, TwoMeans() if with_draft else None)
    bits = lambda nats: nats.mean().item() / (16 * math.log(2))
    measure = lambda strata: dv.bound(model, level.float() / 255, dv.generator(1), sigma, strata)
    terms = measure(1999)
    code = terms.pop('code', torch.zeros(n))
    if with_draft:
        assert torch.allclose(code, torch.tensor(0.5 * (9 - 1 + 40)).double(), rtol=1e-3)
    assert 0 < bits(sum(terms.values()) - exact) < 0.05
    assert bits(measure(200)['chain']) == pytest.approx(bits(terms['chain']), abs=0.1)


def test_slerp_keeps_the_variance_and_hits_both_ends():
    a, b = randn(2, 3, 32, 32)
    assert torch.allclose(dv.slerp(a, b, 0.0), a) and torch.allclose(dv.slerp(a, b, 1.0), b)
    for w in (0.25, 0.5):
        assert abs(dv.slerp(a, b, w).var() - 1) < 0.05
    assert torch.allclose(dv.slerp(a, b, 0.5), (a + b) / (2 + 2 * (a * b).sum()
                          / (a.norm() * b.norm())) ** 0.5, rtol=0.05, atol=0.05)
    assert torch.allclose(dv.slerp(a, 2 * a, 0.5), 1.5 * a, rtol=1e-4)


def test_signals_by_hand():
    x = torch.rand(2, 3, 8, 8)
    assert dv.SIGNALS['image'](x) is x
    grey = dv.SIGNALS['grey'](x)
    assert torch.allclose(grey[:, 1], (x[:, 0] + x[:, 1] + x[:, 2]) / 3) and grey.shape == x.shape
    low = dv.SIGNALS['lowres'](x)
    assert torch.allclose(low[:, :, 4:, :4], x[:, :, 4:, :4].mean((2, 3))[..., None, None])
    masked = dv.SIGNALS['masked'](x)
    assert not masked[:, :, 2:6, 2:6].any() and masked.any()
    masked[:, :, 2:6, 2:6] = x[:, :, 2:6, 2:6]
    assert torch.equal(masked, x)


def test_vae_sees_and_models_the_signal():
    vae = dv.VAE(3, 8, '8d2,4d4,4t1', '1u4,1t4,4u2,4t8', {8: 8, 4: 8, 1: 4}, signal='grey')
    x, eps = torch.rand(2, 3, 8, 8), torch.zeros(2, 4)
    grey = x.mean(1, keepdim=True).expand_as(x)
    assert torch.equal(vae.encode(x)[0], vae.encode(grey)[0])
    draft = vae.decode(vae.encode(x)[0])
    by_hand = ((grey - draft) ** 2).sum() / 2
    assert torch.allclose(vae(x, eps)[1], by_hand)


@pytest.mark.parametrize('form', ['1', '2'])
def test_guidance_and_its_null_condition_by_hand(form):
    """eps = (1 + w) eps(x_hat, z) - w eps(0, 0); the null call is shown y_t in both forms."""
    model, w = tiny(form, z_cond=True).eval(), 1.7
    z, y_T = torch.randn(2, 4), torch.randn(2, 1, 8, 8)
    draft = model.vae.decode(z)
    x_hat, t = 2 * draft - 1, torch.tensor([999, 999])
    shown = y_T + x_hat if form == '2' else y_T
    eps = ((1 + w) * model.unet(torch.cat([shown, x_hat], 1), t, z)
           - w * model.unet(torch.cat([y_T, 0 * x_hat], 1), t, 0 * z))
    a = ALPHA_BAR[-1].item()
    x_0 = ((y_T - (1 - a) ** 0.5 * eps) / a**0.5).clamp(-1, 1)
    refined = model.refine(draft, z, y_T, lambda: 0, guidance=w, steps=1, sampler='ddim')
    assert torch.allclose(refined, (x_0 + 1) / 2, atol=1e-4)


def test_condition_is_dropped_by_image_at_the_given_rate():
    """Dropped: x_hat = 0 and z = 0, so Formulation 2 is shown y_t; the others keep theirs."""
    model, seen = tiny('2', z_cond=True), []
    model.unet.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    eps_z, t, eps, _ = model.noise(4, dv.generator(0))
    keep = torch.tensor([1.0, 0, 1, 0])
    model(torch.rand(4, 1, 8, 8), eps_z, t, eps, keep)
    shown, _, z = seen[0]
    assert not shown[1::2, 1].any() and not z[1::2].any()
    assert shown[::2, 1].abs().amax((1, 2)).all() and z[::2].any(dim=1).all()
    model.cond_drop = 0.2
    kept = torch.cat([model.noise(10, dv.generator(i))[3] for i in range(500)])
    assert abs(kept.mean() - 0.8) < 0.03 and set(kept.tolist()) == {0.0, 1.0}


def test_evaluate_prints_every_model_and_resumes(trained, tmp_path, capsys):
    """The table has all models and calls; stored cells are not measured again."""
    command = ['evaluate', '--out', trained, '--num', 40, '--calls', '2,3']
    assert run(*command, '--json', tmp_path / 't.json') == 0
    text = capsys.readouterr().out
    table = json.loads((tmp_path / 't.json').read_text())
    assert 'about' in text and len(table) == 1 + 2 + 3 * 3 * 2
    assert all(len(seeds) == 2 and len(seeds[0]) == 3 for seeds in table.values())
    assert {'form1 ddim quadratic, 3 calls', 'uncond ddpm quadratic, 2 calls'} <= set(table)
    assert np.mean(table['floor: training images']) < np.mean(table['form1 drafts'])
    before = (trained / 'evaluate.json').read_bytes()
    assert run(*command) == 0 and capsys.readouterr().out.startswith('0 of 20 cells')
    assert (trained / 'evaluate.json').read_bytes() == before
    for bad in (['--num', 9000], ['--calls', '0,5'], ['--calls', 1001], ['--seeds', 1],
                ['--calls', ','], ['--calls', 60, '--start', 50], ['--bits', '--gmm', 2]):
        assert run(*command, *bad) == 2 and bad[0] in capsys.readouterr().err


def test_evaluate_bits_has_the_code_only_with_a_vae(trained, capsys):
    assert run('evaluate', '--out', trained, '--bits', '--num', 4) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and sum(': code' in line for line in lines) == 4
    assert all('decoder' in line and 'L_T' in line for line in lines)


def test_mixture_prior_is_cached_beside_the_checkpoint(trained, capsys):
    command = ['sample', '--out', trained, '--steps', 1, '--num', 4]
    assert run(*command) == 0
    plain = (trained / 'samples-form1.png').read_bytes()
    capsys.readouterr()
    assert run(*command, '--gmm', 2) == 0 and 'EM' in capsys.readouterr().out
    assert (trained / 'stage2-form1-gmm2.pt').exists()
    assert (trained / 'samples-form1.png').read_bytes() != plain
    assert run(*command, '--gmm', 2) == 0 and 'EM' not in capsys.readouterr().out


def test_samples_of_a_mixture_have_its_moments():
    model = tiny('1', T=10)
    L = torch.linalg.cholesky(spd(2, 4, 0)).float()
    means, seen = 3 * randn(2, 4, seed=2).float(), []
    model.vae.decode = lambda z: seen.append(z) or torch.zeros(len(z), 1, 8, 8)
    for chunk in range(60):
        mixture = torch.tensor([0.25, 0.75]), means, L
        dv.sample_chunk(model, dv.Sampling(steps=1), chunk, 64, mixture)
    z, S = torch.cat(seen), L @ L.mT
    mean = 0.25 * means[0] + 0.75 * means[1]
    d = (means[0] - means[1])[:, None]
    covariance = 0.25 * S[0] + 0.75 * S[1] + 0.25 * 0.75 * d @ d.T
    assert torch.allclose(z.mean(0), mean, atol=0.3)
    assert torch.allclose(z.T.cov(), covariance, atol=0.12 * covariance.abs().max())


def cells(path, rows, columns):
    """The images of a picture with margins: [rows][columns] arrays of 64x64 pixels."""
    sheet = np.asarray(Image.open(path)).astype(int)
    top = sheet.shape[0] - 2 * (33 * rows + 1)
    corner = lambda i, j: (top + 2 * (1 + 33 * i), 64 + 2 * (1 + 33 * j))
    place = [[corner(i, j) for j in range(columns)] for i in range(rows)]
    return [[sheet[y:y + 64, x:x + 64] for y, x in row] for row in place]


def test_interpolation_starts_and_ends_at_the_reconstructions(trained):
    how = ['--out', trained, '--steps', 2, '--sampler', 'ddim', '--eta', 1]
    assert run('reconstruct', *how, '--num', 2) == 0
    assert run('interpolate', *how, '--num', 5, '--path', 'linear') == 0
    image, draft, refined = cells(trained / 'reconstruct-form1.png', 3, 2)
    drafts, between, other = cells(trained / 'interpolate-form1.png', 3, 5)
    near = lambda a, b: abs(a - b).max() <= 1
    assert near(drafts[0], draft[0]) and near(drafts[4], draft[1])
    assert near(between[0], refined[0]) and near(between[4], refined[1])
    assert near(other[0], between[0]) and not near(other[4], between[4])
    held_out = dv.load_images('shapes', train=False)
    assert near(image[0][::2, ::2], held_out.pixels[0].permute(1, 2, 0).numpy().astype(int))
    model = load(trained, 'form1')  # the last column has the other noise in every step
    mu, _ = model.vae.encode(held_out.batch([0]))
    options = dv.Sampling(steps=2, sampler='ddim', eta=1.0)
    noise = partial(torch.randn, 1, 3, 32, 32, generator=dv.generator(0, 'other noise'))
    last = dv.to_uint8(dv.paint(model, options, mu, noise)['refined'].detach(), 'shapes')[0]
    assert near(other[4][::2, ::2], last.permute(1, 2, 0).numpy().astype(int))


def test_edit_moves_along_the_difference_of_mean_codes(trained, capsys, monkeypatch):
    seen = []
    paint = dv.paint
    monkeypatch.setattr(dv, 'paint', lambda model, options, z, *rest, **more:
                        seen.append(z) or paint(model, options, z, *rest, **more))
    how = ['--out', trained, '--steps', 1, '--num', 5]
    assert run('edit', *how, '--attribute', 'kind=circle') == 0
    model = load(trained, 'form1')
    images = dv.load_images('shapes')
    mu, _ = model.vae.encode(images.batch(range(len(images))))
    circle = images.labels['kind'] == 1
    direction = mu[circle].mean(0) - mu[~circle].mean(0)
    assert len(seen) == 3
    for z in seen:
        assert torch.allclose(z[4] - z[0], 4 * direction, atol=1e-4)
        assert torch.allclose(z[2], (z[0] + z[4]) / 2, atol=1e-5)
    for attribute, named in (('colour=2', 'hue'), ('kind=blob', 'circle'), ('size>2', 'size>2'),
                             ('', 'hue')):
        capsys.readouterr()
        assert run('edit', *how, '--attribute', attribute) == 2
        message = capsys.readouterr().err
        assert named in message and message.count('\n') == 1
    assert run('edit', *how, '--attribute', 'size>0.5') == 0


def test_attributes():
    labels = dict(kind=torch.tensor([0, 1, 2, 0]), size=torch.tensor([0.1, 0.6, 0.7, 0.5]),
                  Smiling=torch.tensor([0, 1, 1, 0]))
    has = lambda text: dv.has_attribute(labels, text).tolist()
    assert has('kind=circle') == [False, True, False, False]
    assert has('size>0.5') == [False, True, True, False]
    assert has('size<0.5') == [True, False, False, False]
    assert has('Smiling') == [False, True, True, False]
    with pytest.raises(dv.UserError, match='no labels'):
        dv.has_attribute({}, 'kind=tall')


def test_robust_damages_more_and_more(trained):
    assert run('robust', '--out', trained, '--steps', 1, '--num', 4) == 0
    rows = cells(trained / 'robust-form1.png', 6, 4)
    for damaged in rows[::2]:
        distance = [abs(image - damaged[0]).mean() for image in damaged]
        assert distance == sorted(distance) and distance[3] > 0


def test_pictures_need_a_draft_and_guidance_needs_dropping(trained, capsys):
    assert run('reconstruct', '--out', trained, '--form', 'uncond') == 2
    assert 'uncond' in capsys.readouterr().err
    assert run('sample', '--out', trained, '--guidance', 2) == 2
    assert '--cond-drop' in capsys.readouterr().err


def test_general_y(tmp_path, capsys):
    """--signal lowres: the VAE models y in both stages, the refiner x; reconstruct shows both."""
    out = ['--out', tmp_path / 'o']
    command = ['train', '--stage', 1, '--signal', 'lowres', '--steps', 10, *out]
    assert run(*command, *NARROW) == 0
    assert run('train', '--stage', 2, '--steps', 10, '--cond-drop', 0.5, *SMALL, *out) == 0
    assert run('reconstruct', '--steps', 2, '--num', 2, '--guidance', 1, *out) == 0
    image, y, draft, refined = cells(tmp_path / 'o' / 'reconstruct-form1.png', 4, 2)
    x = torch.tensor(image[0][::2, ::2]).permute(2, 0, 1)[None].float() / 255
    by_hand = nn.functional.avg_pool2d(x, 4)[0, :, 3, 5]
    assert abs(255 * by_hand - torch.tensor(y[0][24, 40]).float()).max() <= 1
    root = mnist_files(tmp_path)
    command = ['train', '--stage', 1, '--signal', 'grey', '--data', 'mnist', '--root', root]
    assert run(*command) == 2 and 'grey' in capsys.readouterr().err


# 10. COMMAND LINE ---------------------------------------------------------------------------------


BAD = [
    (['train', '--stage', 3], '--stage'),
    (['train'], '--stage'),
    (['train', '--stage', 1, '--data', 'nothing'], 'nothing'),
    (['train', '--stage', 1, '--steps', 0], '--steps'),
    (['train', '--stage', 1, '--steps', 'x'], '--steps'),
    (['train', '--stage', 1, '--lr', 'nan'], '--lr'),
    (['train', '--stage', 1, '--lr', -1], '--lr'),
    (['train', '--stage', 1, '--lr', 'inf'], '--lr'),
    (['train', '--stage', 1, '--batch', 10**30], '--batch'),
    (['train', '--stage', 1, '--alpha', 'nan'], '--alpha'),
    (['train', '--stage', 1, '--device', 'cuda:7'], '--device'),
    (['train', '--stage', 1, '--device', 'toaster'], '--device'),
    (['train', '--stage', 1, '--encoder', '32y3'], '32y3'),
    (['train', '--stage', 1, '--width', '32:4,8'], '--width'),
    (['train', '--stage', 1, '--size', 40], '--size'),
    (['train', '--stage', 1, '--preset', 'celebahq128'], '--data'),
    (['train', '--stage', 1, '--unknown', 3], '--unknown'),
    (['train', '--stage', 2, '--form', 'uncond', '--heads', 5], 'heads'),
    (['train', '--stage', 2, '--form', 'uncond', '--multipliers', '1,1,1,1,1,1,1,1'], 'halve'),
    (['train', '--stage', 2, '--form', 'uncond', '--attention', '7'], 'attend'),
    (['train', '--stage', 2, '--form', 'uncond', '--timesteps', '20'], '--timesteps'),
    (['train', '--stage', 2], '--stage 1'),
    (['train', '--stage', 1, '--form', '2'], '--form'),
    (['train', '--stage', 2, '--form', '3'], '--form'),
    (['sample', '--num', 0], '--num'),
    (['sample', '--steps', 0], '--steps'),
    (['sample', '--eta', 'nan'], '--eta'),
    (['sample', '--sampler', 'magic'], '--sampler'),
    (['sample'], 'train --stage 2'),
    (['paint'], 'paint'),
    ([], 'COMMAND'),
]


@pytest.mark.parametrize('command, named', BAD, ids=lambda v: ' '.join(map(str, v))[-50:])
def test_bad_input_is_one_line_and_exit_code_2(command, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*command) == 2
    message = capsys.readouterr().err
    assert message.count('\n') == 1 and message.startswith('error: ') and named in message
    assert not list(tmp_path.rglob('*.pt'))


def test_bad_files_are_one_line_and_exit_code_2(trained, tmp_path, capsys, monkeypatch):
    """Empty, junk, damaged, swapped, unwritable: named, and nothing is overwritten."""

    def no_network(*args, **kwargs):
        raise OSError('no network in tests')

    monkeypatch.setattr(urllib.request, 'urlopen', no_network)

    def fails(*command):
        capsys.readouterr()
        assert run(*command) == 2
        message = capsys.readouterr().err.splitlines()
        assert message[-1].startswith('error: ') and 'Traceback' not in str(message)
        return message[-1]

    (tmp_path / 'empty').mkdir()
    out = ['--out', tmp_path / 'o']
    assert 'empty' in fails('train', '--stage', 1, '--data', tmp_path / 'empty', *out)
    for i in range(3):
        (tmp_path / 'empty' / f'{i}.png').write_bytes(b'junk')
    assert 'can be read' in fails('train', '--stage', 1, '--data', tmp_path / 'empty', *out)
    assert 'MNIST/raw' in fails('train', '--stage', 1, '--data', 'mnist', '--root', tmp_path, *out)
    shutil.copytree(trained, tmp_path / 'copy')
    good = (trained / 'stage2-form1.pt').read_bytes()
    path = tmp_path / 'copy' / 'stage2-form1.pt'
    for damaged in (b'', b'junk', good[:len(good) // 2], good[:-20], pickle.dumps(os.getcwd)):
        path.write_bytes(damaged)
        assert 'stage2-form1.pt' in fails('sample', '--out', tmp_path / 'copy')
        assert 'stage2-form1.pt' in fails('train', '--stage', 2, '--out', tmp_path / 'copy')
        assert path.read_bytes() == damaged
    path.write_bytes((trained / 'stage1.pt').read_bytes())
    assert 'stage 1' in fails('sample', '--out', tmp_path / 'copy')
    path.write_bytes((trained / 'stage2-form2.pt').read_bytes())
    assert 'form 2' in fails('sample', '--out', tmp_path / 'copy')
    (tmp_path / 'file').write_text('a file, not a folder')
    assert 'file' in fails('train', '--stage', 1, '--out', tmp_path / 'file' / 'run', *NARROW)
    assert '--steps' in fails('sample', '--out', trained, '--steps', 1001)
    assert '--start' in fails('sample', '--out', trained, '--steps', 5, '--start', 4)
    assert '--num' in fails('sample', '--out', trained, '--num', 65)
    assert '--real' in fails('sample', '--out', trained, '--real')


def test_commands_as_processes(tmp_path):
    """train, train, sample as a user types them; progress without a terminal."""
    def start(*args):
        command = [sys.executable, dv.__file__, *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)

    first = start('train', '--stage', 1, '--steps', 10, *NARROW)
    assert first.returncode == 0, first.stderr
    assert 'squared_error' in first.stdout and 'min left' in first.stdout
    assert '\r' not in first.stdout
    assert start('train', '--stage', 2, '--steps', 10, *SMALL).returncode == 0
    assert start('sample', '--steps', 2, '--num', 4).returncode == 0
    assert (tmp_path / 'runs/shapes/samples-form1.png').exists()


def test_help_names_every_option(capsys):
    for command, settings in (('train', dv.Config), ('sample', dv.Sampling)):
        with pytest.raises(SystemExit):
            run(command, '--help')
        text = capsys.readouterr().out
        assert all('--' + f.name.replace('_', '-') in text for f in dv.fields(settings)
                   if command in (f.metadata['only'] or command))


def test_ci_runs_the_readme_command():
    here = Path(dv.__file__).resolve().parent
    if (here / 'README.md').exists():  # absent where a student's copy is tested
        lines = (here / '.ci/run').read_text().splitlines()
        assert lines[-1] in (here / 'README.md').read_text().splitlines()
