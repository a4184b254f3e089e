"""Slow, obvious float64 versions of the mathematics, written from the equations with nothing shared.

Also the small networks that the tests run: `backbone` up to the target layer, `head` from there on.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- networks -------------------------------------------------------------------------------------


class TinyNet(nn.Module):
    """images (N, ch, 10, 10) -> (logits (N, C), features (N, 6, 5, 5)); two conv layers, then a head.

    head `pool`: mean-pool, FC, tanh, FC.  head `flat`: max-pool, flatten, FC, ReLU, FC.
    """

    channels, hidden = 6, 7

    def __init__(self, num_classes: int = 5, in_chans: int = 1, head: str = "flat", seed: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.kind = head
        self.backbone = nn.Sequential(
            nn.Conv2d(in_chans, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, self.channels, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.fc1 = nn.Linear(self.channels * (4 if head == "flat" else 1), self.hidden)
        self.fc2 = nn.Linear(self.hidden, num_classes)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter *= 4  # Untrained networks say much the same of every image; this one does not.

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(images)
        return self.head(features), features

    def head(self, features: Tensor) -> Tensor:
        if self.kind == "pool":
            return self.fc2(torch.tanh(self.fc1(features.mean((2, 3)))))
        return self.fc2(self.fc1(F.max_pool2d(features, 2).flatten(1)).relu())

    def alpha(self, features: Tensor) -> Callable[[Tensor], Tensor]:
        """α in closed form, as a head may know it: classes (N,) to (N, 6)."""

        def of(classes: Tensor) -> Tensor:
            rows = self.fc2.weight[classes]
            if self.kind == "pool":
                at_hidden = rows * (1 - torch.tanh(self.fc1(features.mean((2, 3)))) ** 2)
                return at_hidden @ self.fc1.weight / 25
            at_hidden = rows * (self.fc1(F.max_pool2d(features, 2).flatten(1)) > 0)
            return at_hidden @ self.fc1.weight.view(self.hidden, self.channels, -1).sum(2) / 25

        return of


def sample_batch(
    samples: int = 7, num_classes: int = 5, in_chans: int = 1, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, ch, 10, 10) in [0, 1], targets (N,) and prototypes (C, 8, 8), each dark in a corner; in float64."""
    generator = torch.Generator().manual_seed(seed)
    brightness = torch.logspace(-1, 1, samples, 5, dtype=torch.float64).view(-1, 1, 1, 1)
    images = torch.rand(samples, in_chans, 10, 10, dtype=torch.float64, generator=generator) ** brightness
    targets = torch.randint(num_classes, (samples,), generator=generator)
    prototypes = torch.rand(num_classes, 8, 8, dtype=torch.float64, generator=generator)
    prototypes[:, 0, 0] = 0
    return images, targets, prototypes


def sample_means(prototypes: Tensor, seed: int = 3) -> Tensor:
    """(C, h, w): mean images that lie about the prototypes, darker, but for a bright corner."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.2 + 0.5 * prototypes + 0.1 * torch.rand(prototypes.shape, dtype=torch.float64, generator=generator)
    means[..., :2, :3] += 0.3
    return means


def sample_masks(samples: int = 7, seed: int = 2) -> Tensor:
    """Masks (N, 10, 10), bool, for the images of `sample_batch`: the first empty, others of half the pixels."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(samples, 10, 10, generator=generator) < 0.5
    masks[0] = samples == 1
    return masks


# --- maps -----------------------------------------------------------------------------------------


def gradient_by_hook(model: TinyNet, image: Tensor, class_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """G = ∂L_c/∂A (K, H, W), A (K, H, W) and the logits (C,) of one image, by hooks and a full backward."""
    caught: dict[str, Tensor] = {}
    forward = model.backbone.register_forward_hook(lambda _m, _i, out: caught.update(features=out.detach()))
    backward = model.backbone.register_full_backward_hook(lambda _m, _i, out: caught.update(gradient=out[0]))
    with torch.enable_grad():
        # The hook wants an input with a gradient.
        logits, _ = model(image[None].clone().requires_grad_())
        logits[0, class_index].backward()
    forward.remove()
    backward.remove()
    model.zero_grad()
    return caught["gradient"][0].detach(), caught["features"][0], logits[0].detach()


def cam_of_one(gradient: Tensor, features: Tensor, normalize: bool = True) -> Tensor:
    """ReLU(Σ_k mean(G_k) A_k), min-max scaled: (K, H, W) twice to (H, W)."""
    channels, height, width = features.shape
    alphas = [sum(gradient[k].flatten().tolist()) / (height * width) for k in range(channels)]
    cam = torch.zeros(height, width, dtype=torch.float64)
    for u in range(height):
        for v in range(width):
            cam[u, v] = max(0.0, sum(alphas[k] * features[k, u, v].item() for k in range(channels)))
    low, high = cam.min().item(), cam.max().item()
    if not normalize:
        return cam
    return torch.zeros_like(cam) if high == low else (cam - low) / (high - low)


def grad_cams(model: TinyNet, images: Tensor, classes: Tensor | None = None, normalize: bool = True) -> Tensor:
    """Grad-CAM image by image (Algorithm 1): (N, H, W)."""
    maps = []
    for i, image in enumerate(images):
        wanted = gradient_by_hook(model, image, 0)[2].argmax().item() if classes is None else classes[i].item()
        gradient, features, _ = gradient_by_hook(model, image, int(wanted))
        maps.append(cam_of_one(gradient, features, normalize))
    return torch.stack(maps)


def class_cams(
    model: TinyNet, images: Tensor, targets: Tensor, num_classes: int, normalize: bool = True
) -> dict[int, Tensor]:
    """Class by class (eq. 3-5): average the full gradients and the features, then pool, weigh, rectify."""
    maps = {}
    for c in range(num_classes):
        members = [gradient_by_hook(model, image, c) for image, y in zip(images, targets, strict=True) if y == c]
        if members:
            mean_gradient = sum(gradient for gradient, _, _ in members) / len(members)
            mean_features = sum(features for _, features, _ in members) / len(members)
            maps[c] = cam_of_one(mean_gradient, mean_features, normalize)
    return maps


# --- distances ------------------------------------------------------------------------------------


def gaussian(size: int, sigma: float = 1.5) -> list[float]:
    weights = [math.exp(-((i - size // 2) ** 2) / (2 * sigma**2)) for i in range(size)]
    return [weight / sum(weights) for weight in weights]


def largest_odd_window(size: int) -> int:
    return max(window for window in range(1, 12, 2) if window <= size)


def power(base: float, exponent: float) -> float:
    """base^exponent; a negative base has no real power that is not whole, and counts as 0 then."""
    return base**exponent if float(exponent).is_integer() else max(base, 0.0) ** exponent


def ssim(x: Tensor, y: Tensor, exponents: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> float:
    """SSIM of two (h, w) maps, window by window (eq. 6-9): mean of l^α·c^β·s^γ."""
    alpha, beta, gamma = exponents
    height, width = x.shape
    rows, columns = gaussian(largest_odd_window(height)), gaussian(largest_odd_window(width))
    c1, c2 = 0.01**2, 0.03**2
    c3 = c2 / 2
    xs, ys = x.tolist(), y.tolist()
    values = []
    for top in range(height - len(rows) + 1):
        for left in range(width - len(columns) + 1):
            window = [
                (rows[i] * columns[j], xs[top + i][left + j], ys[top + i][left + j])
                for i in range(len(rows))
                for j in range(len(columns))
            ]
            mean_x = sum(w * a for w, a, _ in window)
            mean_y = sum(w * b for w, _, b in window)
            var_x = sum(w * (a - mean_x) ** 2 for w, a, _ in window)
            var_y = sum(w * (b - mean_y) ** 2 for w, _, b in window)
            cov = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in window)
            luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
            contrast = (2 * math.sqrt(var_x) * math.sqrt(var_y) + c2) / (var_x + var_y + c2)
            structure = (cov + c3) / (math.sqrt(var_x) * math.sqrt(var_y) + c3)
            values.append(power(luminance, alpha) * contrast**beta * power(structure, gamma))
    return sum(values) / len(values)


def distance(name: str, x: Tensor, y: Tensor, exponents: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> float:
    """d(x, y) of two (h, w) maps."""
    pairs = list(zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))
    if name == "l1":
        return sum(abs(a - b) for a, b in pairs) / len(pairs)
    if name == "l2":
        return sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    return 1 - ssim(x, y, exponents)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, pixel centres at half-integers, edges repeated: (h, w) to size."""

    def neighbours(target: int, targets: int, sources: int) -> tuple[int, int, float]:
        position = max(0.0, (target + 0.5) * sources / targets - 0.5)
        first = min(int(position), sources - 1)
        return first, min(first + 1, sources - 1), position - first

    out = torch.zeros(size, dtype=torch.float64)
    for u in range(size[0]):
        for v in range(size[1]):
            top, bottom, down = neighbours(u, size[0], image.shape[0])
            left, right, across = neighbours(v, size[1], image.shape[1])
            upper = (1 - across) * image[top, left] + across * image[top, right]
            lower = (1 - across) * image[bottom, left] + across * image[bottom, right]
            out[u, v] = (1 - down) * upper + down * lower
    return out


# --- prototypes and objectives --------------------------------------------------------------------


def prototypes(images: Tensor, targets: Tensor, num_classes: int, normalize: bool = True) -> Tensor:
    """Mean over the channels and over the images of each class, min-max scaled: (C, h, w)."""
    out = []
    for c in range(num_classes):
        total, count = torch.zeros(images.shape[2:], dtype=torch.float64), 0
        for image, y in zip(images.double(), targets, strict=True):
            if y == c:
                total += sum(image) / len(image)
                count += 1
        mean = total / count
        low, high = mean.min(), mean.max()
        if normalize:
            mean = torch.zeros_like(mean) if high == low else (mean - low) / (high - low)
        out.append(mean)
    return torch.stack(out)


def cross_entropy(logits: Tensor, targets: Tensor) -> float:
    losses = []
    for row, y in zip(logits.tolist(), targets.tolist(), strict=True):
        losses.append(math.log(sum(math.exp(value) for value in row)) - row[y])
    return sum(losses) / len(losses)


def cam_part(
    name: str,
    model: TinyNet,
    images: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    *,
    cam_class: str = "predicted",
    direction: str = "cam",
    exponents: tuple[float, float, float] = (1.0, 1.0, 1.0),
    margin: float = 1.0,
    masks: Tensor | None = None,
    support: float = 0.05,
    departure: float = 0.36,
) -> float:
    """The unweighted loss on the explanations, of any of the objectives (eq. 1, 10, 11)."""
    right_reasons = {
        "psl": lambda: prototype_support(model, images, targets, prototypes, support),
        "psl_margin": lambda: prototype_support(model, images, targets, prototypes, support, margin=True),
        "pdl": lambda: prototype_departure(model, images, targets, prototypes, sample_means(prototypes), departure),
        "rrr": lambda: input_gradients_inside(model, images, masks),
        "rrr_g": lambda: maps_inside(model, images, targets, masks),
    }
    if name in right_reasons:
        return right_reasons[name]()
    kind, _, measure = name.partition("_")

    def d(cam: Tensor, prototype: Tensor) -> float:
        if direction == "cam":
            return distance(measure, resize(cam, tuple(prototype.shape)), prototype, exponents)
        return distance(measure, cam, resize(prototype, tuple(cam.shape)), exponents)

    if kind == "baseline":
        return 0.0
    if kind == "bcpl":
        maps = class_cams(model, images, targets, len(prototypes))
        return sum(d(cam, prototypes[c]) for c, cam in maps.items())
    if kind == "pl":
        maps = grad_cams(model, images, targets if cam_class == "target" else None)
        return sum(d(cam, prototypes[y]) for cam, y in zip(maps, targets, strict=True)) / len(images)
    total = 0.0
    for image, y, cam in zip(images, targets, grad_cams(model, images), strict=True):
        gray = sum(image) / len(image)
        difference = (resize(cam, tuple(gray.shape)) - gray).flatten().tolist()
        norm = math.sqrt(sum(value**2 for value in difference))
        predicted = gradient_by_hook(model, image, 0)[2].argmax()
        total += norm**2 if predicted == y else max(0.0, margin - norm) ** 2
    return total / len(images)


# --- right for the right reasons ------------------------------------------------------------------


def log_probabilities_gradient(network: Callable[[Tensor], Tensor], source: Tensor) -> Tensor:
    """∂/∂source Σ_c log p_c of one sample's logits `network(source)`, by a backward pass for each class."""
    total = torch.zeros_like(source)
    for c in range(network(source[None]).shape[1]):
        leaf = source.detach().clone().requires_grad_()
        with torch.enable_grad():
            logits = network(leaf[None])[0]
            (gradient,) = torch.autograd.grad(logits[c] - logits.exp().sum().log(), leaf)
        total += gradient
    return total


def prototype_support(
    model: TinyNet, images: Tensor, targets: Tensor, prototypes: Tensor, support: float = 0.05, margin: bool = False
) -> float:
    """PSL, image by image and pixel by pixel."""
    total = 0.0
    for image, y in zip(images, targets.tolist(), strict=True):
        features = model.backbone(image[None])[0].detach()
        gradient = margin_gradient(model, image, y) if margin else log_probabilities_gradient(model.head, features)
        relevance = torch.zeros(features.shape[1:], dtype=torch.float64)
        for k in range(len(features)):
            relevance += (gradient[k] * features[k]) ** 2
        resized = resize(relevance, tuple(prototypes.shape[1:])).tolist()
        for row, prototype in zip(resized, prototypes[y].tolist(), strict=True):
            total += sum(value for value, wanted in zip(row, prototype, strict=True) if wanted < support)
    return total / len(images)


def margin_gradient(model: TinyNet, image: Tensor, y: int) -> Tensor:
    """∂/∂A (L_y - L_j) (K, H, W), j the strongest other class: two hooks, two backward passes."""
    logits = gradient_by_hook(model, image, y)[2].tolist()
    rival = max((c for c in range(len(logits)) if c != y), key=lambda c: logits[c])
    return gradient_by_hook(model, image, y)[0] - gradient_by_hook(model, image, rival)[0]


def prototype_departure(
    model: TinyNet, images: Tensor, targets: Tensor, prototypes: Tensor, means: Tensor, threshold: float = 0.36
) -> float:
    """PDL, image by image and pixel by pixel; the fit from weighted normal equations."""
    size = tuple(images.shape[2:])
    fitted = []
    for prototype, mean in zip(prototypes, means, strict=True):
        columns = torch.stack([prototype.flatten(), torch.ones(prototype.numel(), dtype=torch.float64)], 1)
        weights = torch.ones(prototype.numel(), dtype=torch.float64)
        for _ in range(10):
            weighted = columns.T @ torch.diag(weights)
            slope, offset = torch.linalg.solve(weighted @ columns, weighted @ mean.flatten()).tolist()
            deviations = (mean - slope * prototype - offset).flatten().tolist()
            weights = torch.tensor([1 / max(abs(d), 1e-3) for d in deviations], dtype=torch.float64)
        fitted.append(slope * prototype + offset)
    departs = (resize(departing(means, torch.stack(fitted), threshold), size) > 0.5).tolist()
    total = 0.0
    for image, y in zip(images, targets.tolist(), strict=True):
        expected = resize(fitted[y], size).tolist()
        gradient = log_probabilities_gradient(lambda x: model(x)[0], image).tolist()
        for channel, slopes in zip(image.tolist(), gradient, strict=True):
            for u in range(size[0]):
                for v in range(size[1]):
                    if departs[u][v]:
                        total += ((channel[u][v] - expected[u][v]) * slopes[u][v]) ** 2
    return total / len(images)


def departing(means: Tensor, fitted: Tensor, threshold: float) -> Tensor:
    """1 where means (C, h, w) differ from what was fitted, in standard deviations, and around it; else 0."""
    height, width = means.shape[1:]
    delta = [[0.0] * width for _ in range(height)]
    for u in range(height):
        for v in range(width):
            pairs = [
                (m, min(max(e, 0.0), 1.0))
                for m, e in zip(means[:, u, v].tolist(), fitted[:, u, v].tolist(), strict=True)
            ]
            variance = sum((m + e) / 2 * (1 - (m + e) / 2) for m, e in pairs) / len(pairs)
            delta[u][v] = abs(sum(m - e for m, e in pairs) / len(pairs)) / max(math.sqrt(variance), 1e-3)
    found = torch.zeros(height, width, dtype=torch.float64)
    waiting = [(u, v) for u in range(height) for v in range(width) if delta[u][v] > threshold]
    while waiting:
        u, v = waiting.pop()
        if 0 <= u < height and 0 <= v < width and not found[u, v] and delta[u][v] > threshold / 2:
            found[u, v] = 1
            waiting += [(u + down, v + right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return found


def input_gradients_inside(model: TinyNet, images: Tensor, masks: Tensor) -> float:
    """RRR (Ross et al. 2017, eq. 2), image by image and pixel by pixel; a mean over images."""
    total = 0.0
    for image, mask in zip(images, masks.tolist(), strict=True):
        for channel in log_probabilities_gradient(lambda x: model(x)[0], image).tolist():
            for row, inside in zip(channel, mask, strict=True):
                total += sum(value**2 for value, within in zip(row, inside, strict=True) if within)
    return total / len(images)


def maps_inside(model: TinyNet, images: Tensor, targets: Tensor, masks: Tensor) -> float:
    """RRR-G, image by image and pixel by pixel."""
    total = 0.0
    for cam, mask in zip(grad_cams(model, images, targets), masks.tolist(), strict=True):
        for row, inside in zip(resize(cam, (len(mask), len(mask[0]))).tolist(), mask, strict=True):
            total += sum(value**2 for value, within in zip(row, inside, strict=True) if within)
    return total / len(images)
