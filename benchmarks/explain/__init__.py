"""How fast are the methods and metrics? Against the passes that they make, captum by hand, and quantus.

python -m benchmarks.explain passes      our methods and every metric, over passes x time of one batched pass
python -m benchmarks.explain captum      captum's methods behind `attribute`, over captum called by hand
python -m benchmarks.explain quantus     Deletion, Insertion and muFidelity, over quantus's nearest metrics
python -m benchmarks.explain quick RUN   the quick comparison of two networks on 100 images, with its peak memory
"""
