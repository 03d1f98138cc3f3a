"""Are the guarantees true, and how tight? 10,000 random cases of each, attacked where they speak of all changes.

python -m benchmarks.guarantees --cases 10000
"""
