"Build metadata: settings.ini says what the package is and needs, fastquant/__init__.py its version."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
lib,extra = cfg['lib_path'],'_requirements'
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']

setup(
    name=cfg['lib_name'],
    version=re.search(r'^__version__ = "(.+)"$', (here/lib/'__init__.py').read_text(encoding='utf-8'), re.M)[1],
    author=cfg['author'], author_email=cfg['author_email'], license_expression=cfg['license'], keywords=cfg['keywords'].split(),
    classifiers=['Development Status :: '+statuses[cfg.getint('status')-1], 'Intended Audience :: '+cfg['audience'],
        'Natural Language :: '+cfg['language'], 'Programming Language :: Python :: 3', 'Programming Language :: Python :: 3 :: Only'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[lib, lib+'.*']), package_data={f'{lib}.app':['index.html']},
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix(extra): v.split() for k,v in cfg.items() if k.endswith(extra)},
    entry_points={'nbdev': [f'{lib} = {lib}._modidx:d']}) # where nbdev finds the links of its docs
