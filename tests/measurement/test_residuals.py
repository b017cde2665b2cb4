import torch

from deqdet.measurement.residuals import measure_residuals

UNITS = torch.tensor([1024.0, 1024.0, 8.0, 8.0])  # of the packed position


def test_residuals_are_those_of_a_slow_loop(small_model, make_inputs):
    model, inputs = small_model().train(), make_inputs(1, 0)
    found = measure_residuals(model, [inputs], steps=3)
    assert model.training

    model.eval()
    expected = []
    with torch.no_grad():
        features, before = model.encode(model.preprocess(inputs))
        for layer in [model.decoder.initialization] + 3 * [model.decoder.refinement]:
            after = layer(before, features)
            square = sum(
                (scale * (after_part - before_part)).square().sum((1, 2))
                for after_part, before_part, scale in (
                    (after.position, before.position, 1 / UNITS),
                    (after.content, before.content, 1.0),
                )
            )
            size = (after.position / UNITS).square().sum((1, 2)) + after.content.square().sum((1, 2))
            expected.append((square / size).sqrt())
            before = after
    assert found.shape == (4, 2)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-7)
