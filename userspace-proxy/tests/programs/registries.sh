# Makes what the package managers' servers serve, in the current folder: one package `demo` for each of them.
set -eu
mkdir -p www/pypi/simple/demo www/pypi/files www/npm www/crates/de/mo www/crates/dl www/apt
python3 - <<'PY'
import zipfile
with zipfile.ZipFile("www/pypi/files/demo-1.0-py3-none-any.whl", "w") as wheel:
    info = "demo-1.0.dist-info"
    wheel.writestr("demo.py", "print('demo from pypi')\n")
    wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
    wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(f"{info}/RECORD", "")
PY
sum() { sha256sum "$1" | cut -d' ' -f1; }
wheel=demo-1.0-py3-none-any.whl
echo "<!DOCTYPE html><html><body><a href=\"/files/$wheel#sha256=$(sum www/pypi/files/$wheel)\">$wheel</a></body></html>" > www/pypi/simple/demo/index.html

mkdir -p make/package && echo '{"name":"demo","version":"1.0.0","main":"index.js"}' > make/package/package.json
echo "console.log('demo from npm')" > make/package/index.js
tar -C make -czf www/npm/demo-1.0.0.tgz package
shasum=$(sha1sum www/npm/demo-1.0.0.tgz | cut -d' ' -f1)
cat > www/npm/demo.json <<JSON
{"name":"demo","dist-tags":{"latest":"1.0.0"},"versions":{"1.0.0":{"name":"demo","version":"1.0.0",
 "dist":{"tarball":"https://npm.example/demo-1.0.0.tgz","shasum":"$shasum"}}}}
JSON

mkdir -p make/demo-1.0.0/src && echo '//! demo' > make/demo-1.0.0/src/lib.rs
printf '[package]\nname = "demo"\nversion = "1.0.0"\nedition = "2021"\n' > make/demo-1.0.0/Cargo.toml
tar -C make -czf www/crates/dl/demo-1.0.0.crate demo-1.0.0
echo '{"dl":"https://crates.example/dl/{crate}-{version}.crate","auth-required":true}' > www/crates/config.json
echo "{\"name\":\"demo\",\"vers\":\"1.0.0\",\"deps\":[],\"cksum\":\"$(sum www/crates/dl/demo-1.0.0.crate)\",\"features\":{},\"yanked\":false}" > www/crates/de/mo/demo

mkdir -p make/deb/DEBIAN
printf 'Package: demo\nVersion: 1.0\nArchitecture: all\nMaintainer: a <a@b.example>\nDescription: demo\n' > make/deb/DEBIAN/control
dpkg-deb --build make/deb www/apt/demo_1.0_all.deb > /dev/null
deb=www/apt/demo_1.0_all.deb
{ cat make/deb/DEBIAN/control; printf 'Filename: ./demo_1.0_all.deb\nSize: %s\nSHA256: %s\n' "$(stat -c %s $deb)" "$(sum $deb)"; } > www/apt/Packages
printf 'Origin: demo\nSuite: stable\nSHA256:\n %s %s Packages\n' "$(sum www/apt/Packages)" "$(stat -c %s www/apt/Packages)" > www/apt/Release
