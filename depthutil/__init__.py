"""How neural networks use depth: the package behind "What Are Layers For?".

================= ==============================================================
module            holds
================= ==============================================================
``scaling``       the law of loss against width, depth and data: exact fits,
                  intervals, comparison of laws, optimal shape (needs no torch)
``regimes``       three ways to use depth as minimal simulations, built and
                  learned
``gram``          the Gram matrix of one token's writes, and every norm, angle and
                  cosine read off it
``powerlaw``      one slope on logarithmic scales, its error, and one verdict whether
                  it is a power law
``moments``       means over tokens, with errors over documents
``signatures``    what hidden states say: the diagnostic that tells the three ways
                  apart
``directions``    where updates point: agreement against lag, a test of order, path
                  and chord
``surgery``       lasting changes: grow, drop, loop, tie, insert, fold and mix layers
                  (needs the ``models`` extra)
``primitives``    questions that take reasoning: copying, variables through aliases
``evidence``      do trained layers average? Two numbers over the book's networks
``findings``      findings of papers beside measurements, with verdicts that follow from
                  numbers
``toy``           a grid of students trained at once to imitate deeper teachers; how they
                  use their depth
``stream``        a live model: where its blocks, sublayers, norm and head are and what
                  they really do; hooks that come off whatever happens
``models``        loading language models by name, and texts for them (needs the
                  ``models`` extra)
``trajectory``    what every layer writes, recorded over a corpus: norms, angles,
                  contributions and early decoding, with standard errors
``nulls``         untrained and shuffled networks, to compare a trained one with
``corpus``        the text of the small language models, and its tokens
``ladder``        small language models of one width and several depths, and their
                  training (needs the ``models`` extra)
``interventions`` edits that undo themselves (skip, swap, repeat, patch, erase, noise,
                  scale), and effects measured with them (needs the ``models`` extra)
``hops``          questions of several hops, networks built to answer them and networks
                  trained to
``explorer``      the law as a figure that the reader moves
``archive``       measurements that take longer than a chapter may: saved and
                  read with their provenance
``figures``       the book's look: theme, colours, recurring plots
``checks``        what the book's check cells share
================= ==============================================================

Import the module you need: ``from depthutil import scaling``. The package
itself imports nothing, so ``scaling`` never waits for torch.
"""

__version__ = "0.1.0"
