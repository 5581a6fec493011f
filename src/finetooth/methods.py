"""The named methods: one row of choices each, with its paper, its defaults and where it deviates.

A row is data. To add a method, write its score in `scores.py` and its row here; what its fields mean is in `method.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from finetooth import method, scores
from finetooth.halves import halves, sub_blocks
from finetooth.method import Method
from finetooth.rest import noise, reset
from finetooth.rule import Exchange, Rule, by_model, inside, linear, module_kind, stem
from finetooth.units import Unit
from finetooth.when import every

_GMT = Rule(scores.gradient, keep=0.2, targets="all", threshold=True)
_GMT_POINTS = (
    "The paper writes plain SGD and leaves the moments open.",
    "Ties at the threshold are kept (|g| >= T), as the paper defines it: a tensor most of whose gradient is zero, "
    "such as an embedding, keeps more than its share.",
    "The mask is made once per optimizer step from the accumulated gradient, per tensor; pool='model' is the global variant.",
)
_STATIC = (
    "Targets are the linear, Conv1D and expert weights of the blocks; keep is a share of each tensor (pool='model': of all).",
)
_GRADS = (
    "|g| is the magnitude of the mean gradient over the calibration batches, in eval mode. "
    "Without calibration=, the first optimizer step's accumulated gradient takes its place.",
)

_ROWS = (
    Method(
        "full",
        "Every weight trains: the yardstick.",
        "AdamW, arXiv 1711.05101",
        None,
        state="dense",
        deviations=(
            "bf16 weights have float32 moments and are rounded stochastically; torch.optim.AdamW keeps bf16 moments.",
        ),
    ),
    Method(
        "gmt",
        "Zero the small gradients, then AdamW.",
        "Gradient-Mask Tuning, arXiv 2406.15330",
        _GMT,
        when=every(1),
        state="dense",
        mask="gradient",
        rates={0.001: (9, 9), 0.02: (3, 3), 0.1: (3, 3), 0.2: (3, 3), 0.5: (1, 3), 0.9: (1, 1)},
        deviations=(
            *_GMT_POINTS,
            "This row masks the gradient and then runs AdamW, as everyone does: an entry that is not chosen still moves "
            "by its momentum and by weight decay. For the literal reading take gmt-strict.",
            "Clipping is to the norm of the masked gradient.",
        ),
    ),
    Method(
        "gmt-strict",
        "GMT, and what is not chosen at a step does not move at that step.",
        "Gradient-Mask Tuning, arXiv 2406.15330",
        _GMT,
        when=every(1),
        state="dense",
        mask="update",
        rates={0.001: (81, 81), 0.02: (9, 9), 0.1: (9, 9), 0.2: (3, 3), 0.5: (1, 3), 0.9: (3, 3)},
        deviations=(
            *_GMT_POINTS,
            "This row masks the update: moments see the whole gradient, and only chosen entries are written (decay included).",
            "Clipping is to the norm of the whole gradient, which is what the moments see.",
        ),
    ),
    Method(
        "dst",
        "After every step, only the entries that moved furthest for their size keep their step; the others are the base.",
        "Dynamic Subset Tuning, arXiv 2411.08610",
        Rule(scores.distance(relative=True), keep=0.1, pool=stem, targets="blocks"),
        when=every(1),
        rest=reset(),
        state="dense",
        mask="update",
        options={"relative": True, "zero_moments": False},
        configure=method.dst,
        rates={0.001: (240, 240), 0.005: (81, 81), 0.02: (27, 27), 0.08: (9, 27), 0.35: (3, 3), 0.5: (3, 3)},
        deviations=(
            "A silo is one module in one layer, its bias included. The budget is round(keep * |S|), exactly.",
            "Distances are float32 differences of the proposed weight and the base. Where they tie, as absolute ones do at Adam's first step, "
            "the larger |g| wins, then the smaller index.",
            "Distance is relative, divided by |base| + 1e-8 (the constant is ours), so a weight that is zero in the base comes first. In our study it "
            "learnt as much as the absolute one (relative=False) or more, and forgot less, on all four tasks.",
            "Moments of entries that are reset are kept (zero_moments=True clears them): the paper leaves it open.",
            "Embeddings and head take part on request (targets='all').",
            "bf16: the selection is made on float32 proposals, which are then rounded stochastically, so that a chosen entry may "
            "equal the base.",
        ),
    ),
    Method(
        "gift-sw",
        "Salient input columns train; the others are seen with quantization-sized noise.",
        "GIFT-SW, arXiv 2408.15300",
        Rule(scores.saliency(), Unit("column"), keep=128, targets="dense-linear"),
        rest=noise(4),
        calibration=(scores.input_norm(scores.INFINITY),),
        options={"bits": 4, "gamma": 1.0, "tau": scores.INFINITY, "rho": scores.INFINITY},
        configure=method.gift_sw,
        rates={0.02: (27, 27), 0.1: (9, 9), 0.5: (3, 3)},
        deviations=(
            "128 columns of every linear of the blocks, or all of them where a matrix has fewer: give keep for small models.",
            "The saliency's Q is fitted on all columns, since what is salient is not known yet; the noise's step leaves the "
            "chosen columns out.",
            "The clipping value is searched on 80 steps of 1 % of the row's largest magnitude, by squared error.",
            "Noise is fresh in every forward of the model in training mode. A draw is one of the 65,536 equally likely quantiles of "
            "N(0, 1), scaled to a variance of 1, by a hash of the position; the largest is 4.3.",
            "Expert tensors do not take part: the inputs of single experts cannot be observed by a module hook.",
        ),
    ),
    Method(
        "hft",
        "A random half of the matrices trains, balanced by category and layer.",
        "Half Fine-Tuning, arXiv 2404.18466",
        Rule(scores.random, Unit("matrix"), keep=halves, targets="all"),
        pools=sub_blocks,
        rates={0.5: (1, 3)},
        deviations=(
            "A module's bias goes with its matrix. Where a category has an odd number of modules (3 FFN matrices), a random half "
            "of the layers trains the larger part and the others the smaller.",
            "Embeddings, head and the final norm always train.",
            "A round is one run: another seed, another half. Frozen modules have requires_grad=False.",
        ),
    ),
    Method(
        "nano",
        "The smallest weights, chosen again from time to time.",
        "NanoAdam, arXiv 2506.21374",
        Rule(scores.smallest, keep=0.1),
        when=every(100),
        deviations=(
            *_STATIC,
            "The paper was read in abstract, and its algorithm's header only: a density, an interval of masks and one of densities. "
            "keep=0.1 and every(100) are ours; the density does not change over training.",
            "Units that stay carry their moments and age, new ones start at zero, those that leave keep the value they have.",
            "The choice is by the weight as it is now, per tensor. Base values of whatever has trained are held: 8 bytes each in float32.",
        ),
    ),
    Method(
        "fish",
        "The entries with the largest empirical Fisher information, of the whole model together.",
        "FISH mask, arXiv 2111.09839",
        Rule(scores.fisher, keep=0.005, pool=by_model),
        calibration=("grad_square",),
        deviations=(
            "Squares are of single rows' gradients, added up over the calibration rows: a row at a time, whatever the batches are.",
            "Gradients are of the loss of the given labels (the empirical Fisher), as in the published scripts. Their code can also take the expectation "
            "over the model's own outputs, which for a vocabulary is out of reach.",
            "One budget for all that takes part: the linear, Conv1D and expert weights of the blocks. The paper's is of all parameters "
            "(targets='all'), with the new classifier always in.",
            "keep=0.005 and 1,024 rows are those of these scripts for GLUE, drawn at random there; here the first method.calibration_rows.",
        ),
    ),
    Method(
        "lift",
        "The largest entries of each weight's low-rank approximation, chosen again from time to time.",
        "LIFT, arXiv 2506.00772",
        Rule(scores.principal(), keep=0.05),
        when=every(400),
        options={"rank": 128},
        configure=method.lift,
        rates={0.001: (240, 240), 0.005: (81, 81), 0.02: (27, 27), 0.08: (9, 9), 0.5: (3, 3)},
        deviations=(
            *_STATIC,
            "The paper was read in abstract, with its published code: 5 % of the weights, and rank 128 as its page recommends; its configurations "
            "have 32 to 128 and choose again every 400 steps, one of them every 10. A budget there is (rows + columns) * 128 entries a matrix, "
            "here a share.",
            "The decomposition is torch.linalg.svd, whole, in float32: the same on every rank and after a resume. It costs about "
            "20 n^3 operations for an n x n matrix, at every choice; a randomized one would be faster, and depend on its draws.",
            "The norms, biases and embeddings, which the published code trains whole, are frozen.",
            "Units that stay carry their moments and age, new ones start at zero, those that leave keep the value they have. The code "
            "corrects the bias of all moments by the steps of the run, also of those that began later.",
            "A matrix of at most that rank is its own approximation.",
        ),
    ),
    Method(
        "ssu",
        "Shield the columns that matter most on source data, train the others.",
        "Source-Shielded Updates, arXiv 2512.04844",
        Rule(scores.shield, Unit("column"), keep=0.5, targets="dense-linear"),
        calibration=(scores.input_norm(2.0),),
        source=True,
        deviations=(
            "Calibration batches are of what must not be forgotten, not of the training data: a recipe names them in method.calibration.",
            "The paper was read in a summary, with its published code. The score is the paper's, the sum of |w| * ||x|| over a column; the "
            "code takes the column's 2-norm times the mean of x^2, which ranks otherwise.",
            "Its launch script has half of each matrix frozen and 500 source rows of up to 2,048 tokens; a recipe has method.calibration_rows.",
            "Embeddings, head, norms and biases are frozen. There the first two train whole, and of norms and biases the lesser half of entries.",
            "The script also freezes the embeddings of chat-template tokens; here embeddings do not train at all.",
        ),
    ),
    Method(
        "spectrum",
        "The matrices with the highest signal-to-noise ratio, of each kind of module.",
        "Spectrum, arXiv 2406.06623",
        Rule(scores.signal_to_noise, Unit("matrix"), keep=0.5, pool=module_kind, targets="matrices"),
        deviations=(
            "The ratio is that of the published code: singular values above the threshold over those below, divided by the largest; "
            "sigma is their interquartile range over 1.349.",
            "keep=0.5 is the published code's default; the paper reports 25 % and 50 %. The number of matrices is rounded to nearest, at "
            "least one of each kind.",
            "Embeddings and head always train, as in the configurations that the published code writes. Norms and biases are frozen: there "
            "the norms of the first half of the layers train, as all norms have the same ratio, and the biases of chosen matrices.",
            "Experts stored as one tensor are one matrix, with the mean of their ratios.",
        ),
    ),
    Method(
        "rows",
        "Chosen rows of the embeddings and the head: new tokens.",
        "no paper",
        Rule(scores.listed(()), Unit("row"), keep=0, targets="token-rows"),
        options={"rows": None},
        required=("rows",),
        configure=method.rows,
        deviations=(
            "Rows are numbers of tokens, ranges, or, in a recipe, the texts of tokens. The same rows of the embeddings and of the head; tied "
            "ones are one matrix, and chosen once.",
            "Only matrices with a row for every token take part: targets=['model.embed_tokens.weight'] leaves the head out.",
            "New rows must be there: resize the embeddings, and save that as the base, before the optimizer is built.",
        ),
    ),
    Method(
        "spiel",
        "A random start; from time to time those that moved least make room for those with the largest gradients.",
        "SpIEL, arXiv 2401.16405",
        Rule(scores.grown, keep=0.01, exchange=Exchange(scores.moved, linear(0.2, None), 5)),
        when=every(20),
        rest=reset(),
        options={"turnover": 0.2, "decay": "linear", "steps": None, "window": 5},
        configure=method.spiel,
        rates={0.001: (81, 81), 0.005: (81, 81), 0.02: (9, 27), 0.08: (27, 27), 0.5: (3, 3)},
        deviations=(
            *_STATIC,
            "The paper was read in abstract, with its authors' code for SpIEL-AG: a share of 0.2, a selection every 20 steps, gradients of 5, "
            "and a share that falls linearly to 0. For that the length of the run must be known: steps=, which a recipe fills in; without "
            "it the share stays.",
            "The code's window begins a period, and its first selection replaces the whole random start. Here the window ends a "
            "period, and every selection replaces its share.",
            "Candidates are the units outside the selection with the largest |g| in the first step of a window; their gradients are added up. "
            "Those are the accumulated gradients of whole steps, after accumulation, where the code's are of micro-batches.",
            "What is dropped at a selection is not grown again at the same one. Dropped entries are the base again.",
            "Grown entries start with zero moments and their own age; the code starts them with the window's gradients.",
            "The steps of a window have dense gradients of what takes part; the code drops each tensor's at once.",
            "In bfloat16 the distance is that of the bfloat16 weight, without its float32 master.",
            "SpIEL-MA (SM3's approximate momenta) is not covered.",
        ),
    ),
    Method(
        "lisa",
        "Embeddings and head always, and of the layers between a few drawn by lot, for so many steps.",
        "LISA, arXiv 2403.17919",
        Rule(scores.lottery, Unit("layer"), keep=2, pool=inside, targets="all"),
        when=every(20),
        deviations=(
            "The paper was read in abstract, with parts of its authors' code (LMFlow): everything outside the layers trains, the final norm "
            "too. keep=2 and every(20) are that code's defaults; its examples have one layer.",
            "Layers are drawn evenly, without replacement within a draw.",
            "A layer that rests loses its moments; one that is drawn twice in a row keeps them, where LMFlow's trainer starts them again.",
            "Layers at rest have requires_grad=False, and are drawn between two steps, so that no gradient of theirs is ever computed.",
            "A keep given as a count is one of layers; what lies outside them counts as one, which always trains.",
            "Pretrained values are read where base= says, or from the folder that transformers loaded the model from; else those of "
            "whatever has trained are held.",
        ),
    ),
    Method(
        "badam",
        "The layers in turn, so many steps each.",
        "BAdam, arXiv 2404.02827",
        Rule(scores.turn(), Unit("layer"), keep=1, pool=by_model, targets="blocks"),
        when=every(100),
        options={"order": "random"},
        configure=method.badam,
        deviations=(
            "every(100) and the random order, drawn again for each round, are those of the published code's page, which also recommends "
            "rows / (batch * layers), at least 50; the code's own defaults are 50 and from the last layer to the first.",
            "A layer is a block. Embeddings, head and the final norm are frozen, as there by default.",
            "A layer whose turn is over loses its moments, its rest begins between two steps, and its gradient is not computed. One that ends "
            "a round and begins the next keeps its moments, which the code clears.",
            "The first turn is as long as the others; the code's is a step shorter. Weight decay acts on all of a layer, there on no bias.",
            "keep=2 trains two neighbours in the order, and moves on by one: the second keeps its moments.",
            "Pretrained values are read where base= says, or from the folder that transformers loaded the model from; else those of "
            "whatever has trained are held.",
        ),
    ),
    Method(
        "random",
        "A random share of the weights: the control.",
        "the control of SHiRA-Rand, arXiv 2406.13175",
        Rule(scores.random),
        rates={0.001: (240, 240), 0.005: (81, 81), 0.02: (27, 81), 0.08: (9, 27), 0.35: (3, 3), 0.5: (3, 3)},
        deviations=(*_STATIC, "Chosen by a hash of (seed, name, unit), the same on every device."),
    ),
    Method(
        "grad",
        "The weights with the largest gradient on calibration batches.",
        "SHiRA-Grad, arXiv 2406.13175; SIFT, arXiv 2312.11875",
        Rule(scores.gradient),
        calibration=("grad",),
        rates={0.001: (81, 81), 0.005: (81, 81), 0.02: (9, 27), 0.08: (9, 9), 0.5: (3, 3)},
        deviations=(*_STATIC, *_GRADS),
    ),
    Method(
        "snip",
        "The weights with the largest |gradient * weight| on calibration batches.",
        "SHiRA-SNIP, arXiv 2406.13175; SNIP, arXiv 1810.02340",
        Rule(scores.snip),
        calibration=("grad",),
        deviations=(*_STATIC, *_GRADS),
    ),
    Method(
        "magnitude",
        "The largest weights.",
        "SHiRA-WM, arXiv 2406.13175; arXiv 2412.13488",
        Rule(scores.magnitude),
        deviations=_STATIC,
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})
