// SPDX-License-Identifier: BSD-3-Clause
// Loads an AOTInductor package and classifies one image, without Python.
//   classify MODEL.pt2 IMAGE.ppm     a binary PPM (P6) of the size the model was exported with
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <string>
#include <vector>

// A P6 file as (1, 3, height, width), scaled and normalised as ImageNet's models want it.
torch::Tensor read_image(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  long width = 0, height = 0, most = 0;
  file >> magic >> width >> height >> most;
  TORCH_CHECK(file && magic == "P6" && most == 255, path, " is not a binary PPM of 8 bits");
  file.get();  // the one white space after the header
  std::vector<unsigned char> bytes(3 * width * height);
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<long>(bytes.size()));
  TORCH_CHECK(file, path, " ends early");
  auto pixels = torch::from_blob(bytes.data(), {1, height, width, 3}, torch::kByte);
  auto mean = torch::tensor({0.485f, 0.456f, 0.406f});
  auto deviation = torch::tensor({0.229f, 0.224f, 0.225f});
  return pixels.to(torch::kFloat).div(255).sub(mean).div(deviation).permute({0, 3, 1, 2});
}

int main(int count, char** words) try {
  TORCH_CHECK(count == 3, "usage: ", words[0], " MODEL.pt2 IMAGE.ppm");
  torch::inductor::AOTIModelPackageLoader model(words[1]);
  auto logits = model.run({read_image(words[2]).contiguous()}).at(0);
  std::cout << "class " << logits.argmax(1).item<long>() << std::endl;
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
