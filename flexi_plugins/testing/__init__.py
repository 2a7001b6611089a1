"""What third parties test with: the conformance kit, tiny models, and a pytest plugin.

Two lines in the tests of a distribution run every check on everything that it contributes, one test an object and check:

    def test_conformance(flexi_check):
        flexi_check()

The same from Python: ``flexi_plugins.testing.conformance.check_all``; tiny models: ``flexi_plugins.testing.models``.
"""
