"""Code of the cells that hold q against a posterior, with places for names."""

PROBABILITIES = """
exact = fit.entry.posterior(fit.x).probs.detach()
q = fit.transform()

figure, axes = plt.subplots(figsize=(4.5, 4))
axes.scatter(exact.flatten(), q.flatten(), s=12)
axes.axline((0, 0), slope=1, color="0.5", linewidth=1)
axes.set(xlabel="probability, exact posterior", ylabel="probability, q")
figure.tight_layout()
"""
MOMENTS = """
with torch.no_grad():
    posterior = fit.entry.posterior(fit.x)
    draws = torch.tensor(fit.to_inferencedata(draws={draws}).posterior["{site}"].values[0])  # draw, row, dimension
means = posterior.mean, draws.mean(0)
deviations = posterior.stddev, draws.std(0)

figure, panels = plt.subplots(1, 2, figsize=(5.6, 3))
for axes, what, (exact, q) in zip(panels, ["mean", "standard deviation"], [means, deviations]):
    axes.scatter(exact.flatten(), q.flatten(), s=10)
    axes.axline((float(exact.mean()), float(exact.mean())), slope=1, color="0.5", linewidth=1)
    axes.set(title=what, xlabel="exact posterior", ylabel="q")
figure.tight_layout()
"""
EXACT_FIT = """
reference = ez.fit({model}, data, guide="exact", seed=0)
exact, q = (each.to_inferencedata(draws={draws}).posterior for each in (reference, fit))
"""
NUTS_FIT = """
reference = ez.fit({model}, data, method="nuts", seed=0, chains=2, draws={chain}, warmup={warmup})
exact, q = (each.to_inferencedata(draws={draws}).posterior[{names}] for each in (reference, fit))
"""
DENSITIES = """
figure, panels = plt.subplots({panels}, 1, figsize=(5, 2.6 * {panels}), squeeze=False)
for axes, name in zip(panels[:, 0], exact.data_vars):
    for label, draws in {{"exact posterior": exact, "q": q}}.items():
        first = draws[name].values.reshape(draws.sizes["chain"] * draws.sizes["draw"], -1)[:, 0]
        axes.hist(first, bins=60, density=True, histtype="step", linewidth=1.5, label=label)
    axes.set(xlabel=f"{{name}}, first number", ylabel="density")
figure.legend(*axes.get_legend_handles_labels(), loc="upper center", ncols=2)
figure.tight_layout(rect=(0, 0, 1, 0.93))
"""
SITES = """
values = {values}  # of a finite latent; None for real numbers
with torch.no_grad():
    exact = fit.entry.posterior(fit.x).sample(({draws},))
drawn = fit.to_inferencedata(draws={draws}).posterior
sites = {{name: (exact[name], torch.tensor(drawn[name].values[0])) for name in values}}

figure, panels = plt.subplots(len(sites), 1, figsize=(4.5, 4 * len(sites)), squeeze=False)
for axes, (name, draws) in zip(panels[:, 0], sites.items()):
    if values[name] is None:
        what, pair = f"mean of {{name}}", [each.double().mean(0).flatten() for each in draws]
    else:
        of_value = [torch.stack([each == value for value in range(values[name])], -1) for each in draws]
        what, pair = f"probabilities of {{name}}", [each.double().mean(0).flatten() for each in of_value]
    axes.scatter(*pair, s=10)
    axes.axline((float(pair[0].nanmean()),) * 2, slope=1, color="0.5", linewidth=1)
    axes.set(title=what, xlabel="exact posterior", ylabel="q")
figure.tight_layout()
"""
STATES = """
from elbozoo.models.contract.sequences import by_row

with torch.no_grad():
    exact = by_row(fit.x, fit.entry.posterior(fit.x).probs)
q = fit.transform()

figure, axes = plt.subplots(figsize=(5.6, 3))
axes.plot(exact[:, 0], label="exact posterior")
axes.plot(q[:, 0], "--", label="q")
axes.set(xlabel="row", ylabel="probability of state 0")
axes.legend()
figure.tight_layout()
"""
PATH = """
from elbozoo.models.contract.sequences import lengths

steps = lengths(fit.x)[0]  # of the first sequence
with torch.no_grad():
    posterior = fit.entry.posterior(fit.x)
    draws = torch.tensor(fit.to_inferencedata(draws={draws}).posterior["{site}"].values[0])[:, 0, :steps]
means = posterior.mean[0, :steps], draws.mean(0)
deviations = posterior.variance[0, :steps].sqrt(), draws.std(0)

figure, axes = plt.subplots(figsize=(5.6, 3.2))
for label, mean, deviation in zip(["exact posterior", "q"], means, deviations):
    (line,) = axes.plot(mean[:, 0], label=label)
    low, high = mean[:, 0] - 2 * deviation[:, 0], mean[:, 0] + 2 * deviation[:, 0]
    axes.fill_between(range(len(mean)), low, high, color=line.get_color(), alpha=0.25, linewidth=0)
axes.set(xlabel="step", ylabel="{site}, first dimension")
axes.legend()
figure.tight_layout()
"""
GRID = """
from elbozoo.inference.posterior_grid import posterior_on_grid

grid = posterior_on_grid(fit.entry, fit.x[:{rows}])
drawn = fit.to_inferencedata(draws={draws}).posterior
parts = [torch.tensor(drawn[name].values[0]) for name in {names}]
q = torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], -1)[:, :{rows}]  # draw, row, dimension
"""
CONTOURS = """
figure, panels = plt.subplots(2, 2, figsize=(5.6, 5.2))
for row, axes in enumerate(panels.flat):
    z, density = grid.nodes[row].T.reshape(2, grid.points, -1), grid.density[row].reshape(grid.points, -1)
    axes.scatter(*q[:300, row].T, s=4, alpha=0.4, linewidth=0, label="draws of q")
    axes.contour(*z, density / density.max(), levels=[0.1, 0.4, 0.7, 0.95], colors="black", linewidths=1)
    axes.set(title=f"row {{row + 1}}", xlabel="first latent", ylabel="second latent")
figure.tight_layout()
"""
LINES = """
figure, panels = plt.subplots(2, 2, figsize=(5.6, 4.6))
for row, axes in enumerate(panels.flat):
    axes.plot(grid.nodes[row, :, 0], grid.density[row], color="black", label="posterior by quadrature")
    axes.hist(q[:, row, 0], bins=40, density=True, histtype="step", linewidth=1.5, label="draws of q")
    axes.set(title=f"row {{row + 1}}", xlabel="latent", ylabel="density")
figure.legend(*axes.get_legend_handles_labels(), loc="upper center", ncols=2)
figure.tight_layout(rect=(0, 0, 1, 0.93))
"""
