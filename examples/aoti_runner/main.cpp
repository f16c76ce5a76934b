// Runs a package that `mctf export --to aoti` wrote, without Python: raw float32 images in, raw float32 outputs out.
//
//   runner model.pt2 8 3 224 224 < images.f32 > logits.f32
#include <ATen/Functions.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s PACKAGE SIZE... < images > outputs\n", argv[0]);
    return 2;
  }
  std::vector<int64_t> sizes;
  for (int i = 2; i < argc; ++i) sizes.push_back(std::atoll(argv[i]));
  at::Tensor images = at::empty(sizes);
  const size_t count = images.numel();
  if (std::fread(images.data_ptr<float>(), sizeof(float), count, stdin) != count) {
    std::fprintf(stderr, "%s: fewer images than their sizes say\n", argv[0]);
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  for (const at::Tensor& result : model.run({images})) {
    const at::Tensor output = result.contiguous();
    std::fwrite(output.data_ptr<float>(), sizeof(float), output.numel(), stdout);
  }
  return 0;
}
